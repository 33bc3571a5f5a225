"""The job script of `dsllm launch --write-sbatch`, run as Slurm would run it, with an srun that starts tasks here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, RUN_ID, processes_of, run_launch
from tests.distributed.test_resume import STEPS, arguments, records
from tests.distributed.test_supervised import causes, losses
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 150
IN_FP32 = f"training={{train_steps: {STEPS}, precision: fp32}}"
TOLERANCE = 1e-5
"""A rank that is alone on its host has all the cores of it: sums come in another order."""
NODES = "localhost,127.0.0.1"
"""Two names under which this machine can be reached."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def srun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the PATH with an `srun`."""
    script = tmp_path_factory.mktemp("bin") / "srun"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fake_srun.py "$@"\n')
    script.chmod(0o755)
    return script.parent


@pytest.fixture
def environment(srun: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What a batch script finds on the first of two nodes with a task each."""
    variables = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PATH": f"{srun}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        RUN_ID: tmp_path.name,
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": NODES,
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",  # a batch script has it too, and is no rank
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "4294967291",
    }
    yield variables
    for process in processes_of(tmp_path.name):
        process.kill()


def write_job(corpus: Path, run: Path, environment: dict[str, str], *options: str) -> Path:
    job = run.parent / "job"
    command = [sys.executable, "-m", "dsllm.cli.app", "launch", *arguments(corpus, run, 2, IN_FP32), *options]
    size = ["--num-nodes", "2", "--num-gpus", "1"]
    subprocess.run([*command, *size, "--write-sbatch", job], env=environment, cwd=ROOT, check=True)
    subprocess.run(["bash", "-n", job], check=True)
    return job


def submit(job: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """As Slurm starts a batch script; its output goes where no pipe fills."""
    with job.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(["bash", job], env=environment, stdout=log, stderr=log, start_new_session=True)


def wait(job: Path, process: subprocess.Popen[bytes]) -> tuple[int, str]:
    status = process.wait(TIMEOUT_SECONDS)
    return status, job.with_suffix(".log").read_text()


def left_behind(environment: dict[str, str]) -> list[str]:
    time.sleep(1)
    return [" ".join(process.cmdline()) for process in processes_of(environment[RUN_ID])]


@pytest.fixture(scope="module")
def local(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two ranks of this machine."""
    run = tmp_path_factory.mktemp("runs") / "local"
    run_launch(arguments(corpus, run, 2, IN_FP32), num_ranks=2, timeout_seconds=TIMEOUT_SECONDS)
    return run


def test_a_job_trains_as_two_local_ranks_do(
    corpus: Path, local: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = write_job(corpus, run, environment)
    status, log = wait(job, submit(job, environment))
    assert status == 0, log
    assert losses(run) == pytest.approx(losses(local), abs=TOLERANCE)
    assert causes(run) == ["finished"]
    assert left_behind(environment) == []


def test_the_warning_before_a_jobs_end_saves_and_ends_it_with_0(
    corpus: Path, local: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = write_job(corpus, run, environment)
    process = submit(job, environment)
    while len(records(run)) < 4 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)  # to the process of the script, as --signal=B:USR2@300 has it
    status, log = wait(job, process)
    assert status == 0, log
    done = len(records(run))
    assert 4 <= done < STEPS
    assert (run / "checkpoints" / "latest").read_text() == f"global_step{done}"
    assert causes(run) == ["stopped"]
    assert losses(run) == pytest.approx(losses(local)[:done], abs=TOLERANCE)
    assert left_behind(environment) == []


@pytest.mark.slow
def test_without_the_doctor_srun_alone_starts_and_stops_the_ranks(
    corpus: Path, local: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = write_job(corpus, run, environment, "--no-doctor")
    process = submit(job, environment)
    while len(records(run)) < 4 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    status, log = wait(job, process)
    assert status == 0, log
    assert causes(run) == ["stopped"]
    status, log = wait(job, submit(job, environment))
    assert status == 0, log
    assert losses(run) == pytest.approx(losses(local), abs=TOLERANCE)
    assert causes(run) == ["stopped", "finished"]
    assert left_behind(environment) == []


@pytest.mark.slow
def test_sigterm_to_the_job_saves_too(corpus: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """srun itself would kill the ranks at it: the agents on the nodes hand it on."""
    run = tmp_path / "run"
    job = write_job(corpus, run, environment)
    process = submit(job, environment)
    while len(records(run)) < 4 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, log = wait(job, process)
    assert status == 0, log
    assert causes(run) == ["stopped"]
    assert (run / "checkpoints" / "latest").read_text() == f"global_step{len(records(run))}"
