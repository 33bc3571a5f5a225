"""The hosts of a job, from what each scheduler leaves in the environment."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from dsllm.errors import UserError
from dsllm.launch.allocation import (
    allocated_hosts,
    allocation_source,
    ask_mpirun,
    mpi_hosts,
    sagemaker_hosts,
    slurm_hosts,
)
from dsllm.launch.hostfile import Host

TWO_NODES = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_JOB_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("variables", "slots"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"}, [8, 8]),
        ({"SLURM_GPUS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}, [4, 4]),
        ({"SLURM_GPUS_PER_NODE": "a100:4"}, [4, 4]),
        ({"SLURM_GPUS_PER_NODE": "a100:2,v100:1"}, [3, 3]),
        ({"SLURM_GPUS": "16", "SLURM_GPUS_ON_NODE": "8"}, [8, 8]),
        ({"SLURM_GPUS": "a100:16"}, [8, 8]),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_NTASKS_PER_NODE": "2"}, [2, 2]),
        ({"SLURM_TASKS_PER_NODE": "8(x2)"}, [8, 8]),
        ({"SLURM_TASKS_PER_NODE": "8,4"}, [8, 4]),
    ],
)
def test_slots_are_the_gpus_of_a_node_and_else_its_tasks(variables: dict[str, str], slots: list[int]) -> None:
    assert slurm_hosts({**TWO_NODES, **variables}) == [Host("gpu1", slots[0]), Host("gpu2", slots[1])]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "SLURM_GPUS_ON_NODE: not set, nor any other number of GPUs or tasks; submit the job with --gpus-per-node"),
        ({"SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST: not set; start it inside a job of Slurm"),
        ({"SLURM_JOB_NUM_NODES": "3"}, "SLURM_JOB_NUM_NODES: given 3; SLURM_JOB_NODELIST 'gpu[1-2]' names 2; leave"),
        ({"SLURM_GPUS_ON_NODE": "many"}, "SLURM_GPUS_ON_NODE: given 'many'; must be a number of GPUs such as 8 or"),
        ({"SLURM_GPUS_PER_NODE": "a100:"}, "SLURM_GPUS_PER_NODE: given 'a100:'; must be a number of GPUs such as"),
        ({"SLURM_GPUS": "10", "SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS: given 10 for 2 nodes, which leaves them"),
        ({"SLURM_GPUS": "7"}, "SLURM_GPUS: given 7 for 2 nodes, which leaves them different numbers; submit the job"),
        ({"SLURM_NTASKS_PER_NODE": "0"}, "SLURM_NTASKS_PER_NODE: given '0'; must be a whole number from 1"),
        ({"SLURM_TASKS_PER_NODE": "8(x3)"}, "SLURM_TASKS_PER_NODE: given '8(x3)'; must be the tasks of each of 2"),
        ({"SLURM_TASKS_PER_NODE": "8(x,4"}, "SLURM_TASKS_PER_NODE: given '8(x,4'; must be the tasks of each of 2"),
        ({"SLURM_TASKS_PER_NODE": "8,0"}, "SLURM_TASKS_PER_NODE: given '8,0'; must be the tasks of each of 2 nodes"),
    ],
)
def test_a_variable_of_slurm_that_is_missing_or_malformed_is_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        slurm_hosts({**TWO_NODES, **variables})
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    "environment",
    [
        {"SM_HOSTS": '["algo-1","algo-2"]', "SM_CURRENT_HOST": "algo-2", "SM_NUM_GPUS": "8"},
        {"SM_RESOURCE_CONFIG": '{"current_host":"algo-1","hosts":["algo-1","algo-2"]}', "SM_NUM_GPUS": "8"},
    ],
)
def test_sagemaker_names_its_hosts_in_the_order_that_all_of_them_see(environment: dict[str, str]) -> None:
    assert sagemaker_hosts(environment) == [Host("algo-1", 8), Host("algo-2", 8)]


def test_a_sagemaker_host_without_gpus_runs_one_rank() -> None:
    assert sagemaker_hosts({"SM_HOSTS": '["algo-1"]', "SM_NUM_GPUS": "0"}) == [Host("algo-1", 1)]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "SM_HOSTS: not set; start it inside a training job of SageMaker"),
        ({"SM_HOSTS": "algo-1,algo-2"}, "SM_HOSTS: given 'algo-1,algo-2'; must name the hosts as JSON, such as"),
        ({"SM_HOSTS": "[]"}, "SM_HOSTS: given '[]'; must name the hosts as JSON"),
        ({"SM_HOSTS": "[1]"}, "SM_HOSTS: given '[1]'; must name the hosts as JSON"),
        ({"SM_RESOURCE_CONFIG": "{}"}, "SM_RESOURCE_CONFIG: given '{}'; must name the hosts as JSON"),
        ({"SM_HOSTS": '["a"]'}, "SM_NUM_GPUS: not set; start it from the job's entry point"),
        ({"SM_HOSTS": '["a"]', "SM_CURRENT_HOST": "b"}, "SM_CURRENT_HOST: given 'b', which is none of a; unset it"),
        ({"SM_HOSTS": '["a"]', "SM_NUM_GPUS": "x"}, "SM_NUM_GPUS: given 'x'; must be a number of GPUs"),
    ],
)
def test_a_variable_of_sagemaker_that_is_missing_or_malformed_is_named(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError) as refusal:
        sagemaker_hosts(environment)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PBS_NODEFILE", "node1\nnode1\nnode2\nnode2\n"),
        ("PE_HOSTFILE", "node1 2 all.q@node1 UNDEFINED\nnode2 1 all.q@node2 <NULL>\nnode2 1 gpu.q@node2 <NULL>\n"),
        ("OMPI_MCA_orte_default_hostfile", "# mine\nnode1 slots=2 max_slots=8\n\nme@node2 max-slots=2  # last\n"),
        ("PRTE_MCA_prte_default_hostfile", "node1 slots=2\nnode2 slots=2\n"),
    ],
)
def test_mpi_hosts_are_read_from_the_file_of_the_scheduler(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "hosts").write_text(text)
    environment = {name: str(tmp_path / "hosts")}
    assert mpi_hosts(environment) == [Host("node1", 2), Host("node2", 2)]
    assert allocation_source(environment) == "mpi"


def test_mpi_hosts_of_lsf_are_names_and_slots_in_turn() -> None:
    assert mpi_hosts({"LSB_MCPU_HOSTS": "node1 8 node2 4 "}) == [Host("node1", 8), Host("node2", 4)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("PBS_NODEFILE", "\n", "PBS_NODEFILE: it lists no host; start it inside a job of the scheduler"),
        ("PE_HOSTFILE", "node1\n", "line 1: given 'node1'; begins with host and slots"),
        ("PE_HOSTFILE", "a 1 q p\nb 0 q p\n", "line 2: given 'b 0 q p'; begins with host and slots"),
        (
            "OMPI_MCA_orte_default_hostfile",
            "\na\n",
            "line 2: given 'a'; must say how many ranks, such as `node1 slots=8`",
        ),
        ("OMPI_MCA_orte_default_hostfile", "a slots=x\n", "line 1: given 'a slots=x'; must say how many ranks"),
        ("PBS_NODEFILE", None, "hosts cannot be read: No such file or directory; leave it as the scheduler sets it"),
    ],
)
def test_a_file_of_the_scheduler_that_is_wrong_is_named(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError) as refusal:
        mpi_hosts({name: str(tmp_path / "hosts")})
    assert str(refusal.value).startswith(f"{name}: ")
    assert message in str(refusal.value)


@pytest.mark.parametrize("text", ["node1", "node1 8 node2", "  "])
def test_lsf_hosts_without_their_slots_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be hosts and their slots, such as `node1 8 node2 8`"):
        mpi_hosts({"LSB_MCPU_HOSTS": text})


def stand_in(folder: Path, script: str) -> None:
    (folder / "mpirun").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "mpirun").chmod(stat.S_IRWXU)


def test_mpirun_is_asked_where_no_variable_names_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "[ $1 = hostname ] && printf 'b\\na\\nb\\n'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert mpi_hosts({}) == [Host("b", 2), Host("a", 1)]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exec sleep 60", "mpirun: no answer in 1 s; see that `mpirun hostname` ends"),
        ("echo no route to b >&2; exit 1", "mpirun: failed: no route to b; see that `mpirun hostname` works"),
        ("exit 7", "mpirun: failed: exit status 7; see that"),
        ("exit 0", "mpirun hostname: it lists no host; start it inside a job of the scheduler"),
    ],
)
def test_an_mpirun_that_does_not_answer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    stand_in(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError) as refusal:
        ask_mpirun(seconds=1)
    assert str(refusal.value).startswith(message)


def test_a_missing_mpirun_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="mpirun: not installed; install Open MPI, or name the hosts with --hostfile"):
        ask_mpirun()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_the_real_mpirun_finds_this_machine() -> None:
    [host] = ask_mpirun()
    assert host.slots >= 1


@pytest.mark.parametrize(
    ("environment", "source"),
    [
        (TWO_NODES, "slurm"),
        ({"SM_HOSTS": "[]"}, "sagemaker"),
        ({"LSB_MCPU_HOSTS": "a 1"}, "mpi"),
        ({"PBS_NODEFILE": ""}, None),
        ({}, None),
    ],
)
def test_the_scheduler_is_known_by_its_variables(environment: dict[str, str], source: str | None) -> None:
    assert allocation_source(environment) == source


def test_a_source_is_read_by_its_name() -> None:
    assert allocated_hosts("slurm", {**TWO_NODES, "SLURM_GPUS_ON_NODE": "8"}) == [Host("gpu1", 8), Host("gpu2", 8)]
    assert allocated_hosts("sagemaker", {"SM_HOSTS": '["a"]', "SM_NUM_GPUS": "1"}) == [Host("a", 1)]
    assert allocated_hosts("mpi", {"LSB_MCPU_HOSTS": "a 1"}) == [Host("a", 1)]
