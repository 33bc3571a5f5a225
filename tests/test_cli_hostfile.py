"""`dsllm hostfile`: the hosts of a job, in DeepSpeed's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dsllm.cli.app import app
from dsllm.errors import UserError
from dsllm.launch.hostfile import Host, read_hostfile

SLURM = {"SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}


def run(*arguments: str, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, ["hostfile", *arguments], env=SLURM if environment is None else environment)


def test_it_prints_a_line_for_each_host() -> None:
    assert run("--from", "slurm").stdout == "gpu1 slots=8\ngpu2 slots=8\n"


def test_what_it_writes_is_read_by_deepspeed_and_by_dsllm(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    result = run("--from", "slurm", "--output", str(path))
    assert result.stdout == f"{path}: 2 hosts, 16 slots\n"
    assert read_hostfile(path) == [Host("gpu1", 8), Host("gpu2", 8)]
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert runner.fetch_hostfile(str(path)) == {"gpu1": 8, "gpu2": 8}


def test_one_host_with_one_slot_is_counted_in_the_singular(tmp_path: Path) -> None:
    environment = {"SM_HOSTS": '["algo-1"]', "SM_NUM_GPUS": "1"}
    result = run("--from", "sagemaker", "--output", str(tmp_path / "hosts"), environment=environment)
    assert result.stdout.endswith(": 1 host, 1 slot\n")


def test_json_names_hosts_and_slots() -> None:
    result = run("--from", "mpi", "--json", environment={"LSB_MCPU_HOSTS": "a 8 b 4"})
    assert json.loads(result.stdout) == [{"host": "a", "slots": 8}, {"host": "b", "slots": 4}]


def test_outside_a_job_it_says_what_is_missing() -> None:
    result = run("--from", "slurm", environment={"SLURM_JOB_NODELIST": ""})
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith("SLURM_JOB_NODELIST: not set; start it inside a job of Slurm")


def test_the_source_has_to_be_named() -> None:
    assert run().exit_code == 2
    assert run("--from", "pbs").exit_code == 2
