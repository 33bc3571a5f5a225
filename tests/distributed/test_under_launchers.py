"""dsllm/train.py under launchers other than DeepSpeed's: it finds its place under each, and trains the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsllm.launch.environment import as_text
from tests.distributed.harness import free_port
from tests.distributed.test_resume import TRAIN, arguments, records
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

STEPS = 2
TIMEOUT_SECONDS = 180
LAUNCH = "0123456789abcdef"
TORCHRUN = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "--monitor-interval", "3"]
"""Where it looks more often it may end rank 0 before that has said what it ends by itself for."""
MPIRUN = ["mpirun", "-np", "2", "--oversubscribe", "--bind-to", "none"]
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun: apt-get install openmpi-bin")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


def flags(corpus: Path, run: Path, *overrides: str) -> list[str]:
    few = f"training={{train_steps: {STEPS}, precision: fp32}}"
    return arguments(corpus, run, 2, few, "schedule={warmup_steps: 0}", "evaluation.interval=1000", *overrides)


def start(command: list[Any], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher, in an environment that no earlier one has left its mark on."""
    marks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in marks}
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(
        [str(word) for word in command],
        env={**environment, **settings, **as_root, **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def meeting() -> dict[str, str]:
    """Where two ranks of this machine meet."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def torchrun_of(script: list[Any]) -> list[Any]:
    return [*TORCHRUN, "--master-port", free_port(), *script]


def words_of(run: Path, rank: int) -> dict[str, Any]:
    return json.loads((run / "logs" / f"rank{rank}.ended.json").read_text())


@pytest.fixture(scope="module")
def losses(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of two ranks under torchrun."""
    run = tmp_path_factory.mktemp("runs") / "torchrun"
    result = start(torchrun_of([TRAIN, *flags(corpus, run)]))
    assert result.returncode == 0, result.stderr
    assert json.loads((run / "passport.json").read_text())["world_size"] == 2
    return [record["loss"] for record in records(run)]


def test_two_ranks_train_under_torchrun(losses: list[float]) -> None:
    assert len(losses) == STEPS


@needs_mpirun
def test_mpirun_trains_the_same_and_no_mpi4py_is_needed(corpus: Path, losses: list[float], tmp_path: Path) -> None:
    """With the address and port in the private file, as dsllm launch has them: and of the two only rank 0 speaks."""
    private = tmp_path / "environment"
    private.touch(0o600)
    private.write_text(as_text({**meeting(), "DSLLM_WORLD_SIZE": "2", "DSLLM_LAUNCH": LAUNCH}))
    script = [sys.executable, TRAIN, *flags(corpus, tmp_path / "run"), "--environment-file", private]
    result = start([*MPIRUN, *script])
    assert result.returncode == 0, result.stderr
    assert [record["loss"] for record in records(tmp_path / "run")] == losses
    assert result.stderr.count(f"trained to step {STEPS} of {STEPS}") == 1
    assert list((tmp_path / "run" / "logs").glob("*.ended.json")) == []


@needs_mpirun
def test_mpirun_without_an_address_is_told_how_to_give_it_once(corpus: Path, tmp_path: Path) -> None:
    result = start([*MPIRUN, sys.executable, TRAIN, *flags(corpus, tmp_path / "run")])
    assert result.returncode == 2
    assert result.stderr.count("MASTER_ADDR and MASTER_PORT: not set for 2 ranks of Open MPI; must be the address") == 1
    assert "mpirun -x MASTER_ADDR=… -x MASTER_PORT=29500, or start with dsllm launch" in result.stderr


def test_a_world_of_another_size_ends_at_once_with_both_numbers_once(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = start(torchrun_of([TRAIN, *flags(corpus, run)]), DSLLM_WORLD_SIZE="4", DSLLM_LAUNCH=LAUNCH)
    assert result.returncode != 0  # torchrun's own
    line = (
        "DSLLM_WORLD_SIZE: given 4, and deepspeed or torchrun started 2 ranks; they must be the same; see that it "
        "starts them on every host, or unset DSLLM_WORLD_SIZE\n"
    )
    assert result.stderr.count(line) == 1
    words = words_of(run, 0)
    assert (words["cause"], words["exit_status"], words["launch"]) == ("user_error", 2, LAUNCH)
    assert words["message"] == line.strip()


def test_a_mistake_that_every_rank_finds_is_said_once_and_left_by_each(corpus: Path, tmp_path: Path) -> None:
    """It is found on rank 0, after the ranks have met, and then known to all."""
    run = tmp_path / "run"
    script = [TRAIN, *flags(corpus, run), "--resume", tmp_path / "nothing"]
    result = start(torchrun_of(script), DSLLM_LAUNCH=LAUNCH)
    assert result.returncode != 0
    assert result.stderr.count("nothing: no checkpoint there; give a run") == 1
    assert [words_of(run, rank)["cause"] for rank in (0, 1)] == ["user_error"] * 2
    assert [words_of(run, rank)["is_own"] for rank in (0, 1)] == [True, False]
    assert "no checkpoint there" in (run / "logs" / "rank1.log").read_text()
