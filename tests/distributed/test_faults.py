"""Each fault is one line on stderr with the right exit status, and costs nothing that was saved."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_python_ranks
from tests.distributed.test_resume import arguments, records, train_and_signal
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

SMALL_DISK_BYTES = 4 * 2**20
"""Room for one checkpoint of the small model (2.7 MB), not for two."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def small_disk(folder: Path) -> Any:
    """A run folder whose checkpoints are on a disk of 4 MB; None where this user may not mount one."""
    checkpoints = folder / "small-disk" / "checkpoints"
    checkpoints.mkdir(parents=True)
    size = f"size={SMALL_DISK_BYTES}"
    mounted = (
        os.geteuid() == 0 and not subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", checkpoints]).returncode
    )
    yield checkpoints.parent if mounted else None
    if mounted:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", checkpoints], check=True)


@pytest.fixture(scope="module")
def told(folder: Path, small_disk: Path | None) -> dict[str, Any]:
    """How each attempt of tests/distributed/attempts.py ended on rank 0."""
    corpus = write_corpus(folder / "corpus")
    flags = arguments(
        corpus, folder / "run", 2, "training.train_steps=4", "checkpoint.interval=2", "guards.step_0_checks=false"
    )
    return run_python_ranks(
        Path(__file__).with_name("attempts.py"),
        "tell",
        {
            "flags": flags,
            "run": str(folder / "run"),
            "data": f"{corpus}-tokens",
            "small_disk": small_disk and str(small_disk),
        },
        num_ranks=2,
        timeout_seconds=280,
    )[0]


def one_line(outcome: dict[str, Any], status: int) -> str:
    """The single line that an attempt ended with, progress left out."""
    assert outcome["status"] == status, outcome
    assert "Traceback" not in outcome["stderr"]
    return outcome["stderr"].strip().splitlines()[-1]


def test_a_finished_run_is_told_so_and_left_alone(told, folder: Path) -> None:
    assert (told["first"]["status"], told["first"]["cause"]) == (0, None)
    assert "trained to step 4 of 4" in one_line(told["finished already"], 0)
    assert [record["step"] for record in records(folder / "run")] == [1, 2, 3, 4]


def test_a_spec_that_makes_another_run_is_refused_with_the_field_and_both_values(told) -> None:
    line = one_line(told["other seed"], 2)
    assert "seed (was 1337, now 7)" in line
    assert "another --run-dir" in line


def test_resume_never_does_not_overwrite_an_earlier_run(told) -> None:
    assert "holds global_step4 of an earlier run; choose another --run-dir" in one_line(told["never"], 2)


def test_a_checkpoint_that_is_not_there_is_refused(told) -> None:
    assert "global_step77: no checkpoint there" in one_line(told["nothing there"], 2)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("latest gone", "there is no file named latest; going on from the newest, global_step4"),
        ("latest elsewhere", "latest names global_step99, which is not there or not complete; going back to global_s"),
        ("no manifest", "latest names global_step4, which is not there or not complete; going back to global_step2"),
        ("cut file", "global_step4: bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt has "),
        (
            "flipped byte",
            "global_step4: bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged: its checksum is not",
        ),
        ("missing file", "global_step4: bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt is missing; going back to the"),
        ("flipped manifest", "global_step4"),
    ],
)
def test_damage_is_named_before_anything_is_loaded_and_the_run_goes_back(told, folder, damage: str, words: str) -> None:
    """After each of them the run trains the lost steps again, and saves: the next damage meets a sound checkpoint."""
    assert "trained to step 4 of 4" in one_line(told[damage], 0)
    assert words in told[damage]["stderr"]
    goes_back = damage not in ("latest gone", "latest elsewhere")
    used = "global_step2" if goes_back else "global_step4"
    assert f"going on from {folder}/run/checkpoints/{used}\n" in told[damage]["stderr"]


def test_a_copy_that_fails_on_one_rank_is_no_checkpoint_and_no_end_before_the_last(told, folder: Path) -> None:
    assert "global_step2 was not saved: rank 1: MemoryError" in told["copy fails"]["stderr"]
    assert "global_step4 was not saved: rank 1: MemoryError" in one_line(told["copy fails"], 1)
    assert told["copy fails"]["cause"] == "out_of_memory"
    assert list((folder / "run-4" / "checkpoints").iterdir()) == []


def test_where_nothing_is_sound_the_run_ends_with_1_and_says_so(told) -> None:
    assert "; no other checkpoint is sound" in one_line(told["all damaged"], 1)
    line = one_line(told["named and damaged"], 1)
    assert "is damaged: its checksum is not that of what was written; name another with --resume PATH" in line


def test_a_corrupt_shard_is_found_by_its_checksum_and_named(told) -> None:
    assert "corpus-train-00000.bin" in one_line(told["corrupt shard"], 2)
    assert told["corrupt shard"]["cause"] == "user_error"


def test_losses_that_are_not_numbers_stop_the_run_with_step_ranks_and_samples(told) -> None:
    line = one_line(told["too high a rate"], 1)
    assert told["too high a rate"]["cause"] == "non_finite"
    assert line.startswith("step 4: the loss of rank 0 is not finite, on samples 24 to 27; the loss of rank 1 is not ")
    assert "that makes 3 in a row, guards.nonfinite_limit; the run stops" in line


@pytest.fixture
def on_small_disk(told, small_disk: Path | None) -> dict[str, Any]:
    if small_disk is None:
        pytest.skip("needs root, to mount a small tmpfs")
    return told


def test_a_disk_without_room_is_foretold_and_found_before_anything_is_written(on_small_disk) -> None:
    line = one_line(on_small_disk["full disk, to stop"], 1)
    assert on_small_disk["full disk, to stop"]["cause"] == "disk"
    assert "global_step4 was not saved: it takes 3." in line
    told = on_small_disk["full disk"]
    assert "and the run comes to need" in told["stderr"]
    assert "global_step4 was not saved: it takes 3." in told["stderr"]
    assert "the run goes on, and tries again at the next one" in told["stderr"]
    assert "global_step6 was not saved: it takes 3." in one_line(told, 1)
    assert on_small_disk["latest on it"] == "global_step2"


def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(on_small_disk) -> None:
    line = one_line(on_small_disk["filled up meanwhile"], 1)
    assert "global_step6 was not saved: rank" in line
    assert "could not be written: No space left on device" in line
    assert on_small_disk["filled up meanwhile"]["cause"] == "disk"
    assert on_small_disk["left on it"] == {"global_step2": True, "latest": False}


def test_a_read_only_disk_is_named_and_with_room_the_run_goes_on(on_small_disk, small_disk: Path) -> None:
    assert "could not be written: Read-only file system; earlier checkpoints are" in one_line(
        on_small_disk["read-only"], 1
    )
    assert on_small_disk["read-only"]["cause"] == "disk"
    assert (on_small_disk["with room"]["status"], on_small_disk["with room"]["cause"]) == (0, None)
    assert [record["step"] for record in records(small_disk)] == [1, 2, 3, 4, 5, 6]


def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on(folder: Path) -> None:
    run = folder / "stopped"
    train_and_signal(write_corpus(folder / "corpus"), run, 2, signal.SIGTERM, after_step=2)
    done = len(records(run))
    assert 2 <= done < 12
    assert (run / "checkpoints" / "latest").read_text() == f"global_step{done}"
    log = (run / "logs" / "rank0.log").read_text()
    assert f"stopped by SIGTERM after step {done} of 12" in log
    assert "the same command goes on from there" in log
