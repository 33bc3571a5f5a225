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

CHECKPOINT_BYTES = 3 * 2**20
"""Room for one checkpoint of the small model (2 MB), not for two."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def small_disk(folder: Path) -> Any:
    """A run folder whose checkpoints are on a disk of 3 MB; None where this user may not mount one."""
    checkpoints = folder / "small-disk" / "checkpoints"
    checkpoints.mkdir(parents=True)
    size = f"size={CHECKPOINT_BYTES}"
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
    flags = arguments(corpus, folder / "run", 2, "training.train_steps=4", "checkpoint.interval=2")
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
        timeout_seconds=240,
    )[0]


def one_line(outcome: dict[str, Any], status: int) -> str:
    """The single line that an attempt ended with, progress left out."""
    assert outcome["status"] == status, outcome
    assert "Traceback" not in outcome["stderr"]
    return outcome["stderr"].strip().splitlines()[-1]


def test_a_finished_run_is_told_so_and_left_alone(told, folder: Path) -> None:
    assert told["first"]["status"] == 0
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


def test_latest_naming_a_folder_that_is_gone_names_those_that_are_there(told) -> None:
    line = one_line(told["latest gone"], 2)
    assert "names global_step99, which is not there; there are global_step2, global_step4" in line


def test_a_cut_checkpoint_file_ends_the_run_and_names_the_checkpoint(told) -> None:
    line = one_line(told["cut state"], 1)
    assert "global_step4: cannot be read" in line
    assert "--resume" in line


def test_a_corrupt_shard_is_found_by_its_checksum_and_named(told) -> None:
    assert "corpus-train-00000.bin" in one_line(told["corrupt shard"], 2)


def test_a_loss_that_is_not_a_number_stops_the_run_with_its_step(told) -> None:
    line = one_line(told["too high a rate"], 1)
    assert line.startswith("step ")
    assert "the loss is nan" in line


def test_a_full_disk_ends_the_run_and_the_earlier_checkpoint_still_loads(told, small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("needs root, to mount a small tmpfs")
    line = one_line(told["full disk"], 1)
    assert "global_step4 was not saved: rank" in line
    assert "No space left on device" in line
    assert told["left on it"] == {"global_step2": True, "latest": False}
    assert told["latest on it"] == "global_step2"
    assert told["with room"]["status"] == 0
    assert [record["step"] for record in records(small_disk)] == [1, 2, 3, 4]


def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on(folder: Path) -> None:
    run = folder / "stopped"
    train_and_signal(write_corpus(folder / "corpus"), run, 2, signal.SIGTERM, after_step=2)
    done = len(records(run))
    assert 2 <= done < 12
    assert (run / "checkpoints" / "latest").read_text() == f"global_step{done}"
    log = (run / "logs" / "rank0.log").read_text()
    assert f"stopped by SIGTERM after step {done} of 12" in log
    assert "the same command goes on from there" in log
