"""The place of a process under every launcher, and what is said where one leaves something out."""

from __future__ import annotations

import pytest

from dsllm.errors import UserError
from dsllm.launch.placement import ALONE, Place, place_in, take_place

DEEPSPEED = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_SIZE": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
TORCHRUN = {**DEEPSPEED, "LOCAL_WORLD_SIZE": "4"}
del TORCHRUN["LOCAL_SIZE"]
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = {
    "SLURM_JOB_ID": "70123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
BATCH_SCRIPT = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
del BATCH_SCRIPT["SLURM_STEP_ID"]


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        (DEEPSPEED, "deepspeed or torchrun"),
        (TORCHRUN, "deepspeed or torchrun"),
        (OPEN_MPI, "Open MPI"),
        (MPICH, "MPICH"),
        (SLURM, "Slurm"),
        ({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8"}, "Slurm"),  # srun --mpi=pmi2
        ({**OPEN_MPI, **BATCH_SCRIPT}, "Open MPI"),  # mpirun in a batch script
        ({**SLURM, "SLURM_STEP_ID": "1", "SLURM_PROCID": "0", **DEEPSPEED}, "deepspeed or torchrun"),  # started by srun
    ],
)
def test_every_launcher_tells_the_place_in_its_own_words(environment: dict[str, str], launcher: str) -> None:
    assert place_in(environment) == Place(5, 1, 8, 4, launcher)


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"], ids=["batch script", "batch step", "salloc"])
def test_what_srun_did_not_start_is_no_rank(step: str | None) -> None:
    environment = BATCH_SCRIPT if step is None else {**BATCH_SCRIPT, "SLURM_STEP_ID": step}
    assert place_in(environment) is None


@pytest.mark.parametrize(
    ("tasks", "node", "local_size"),
    [("4(x2),3", "0", 4), ("4(x2),3", "1", 4), ("4(x2),3", "2", 3), ("2,1", "1", 1), ("8", "0", 8), ("", "0", None)],
)
def test_slurms_tasks_on_this_node_are_read_from_those_on_all(tasks: str, node: str, local_size: int | None) -> None:
    environment = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}
    assert place_in(environment).local_size == local_size


def test_without_slurms_list_what_the_job_asked_for_on_each_node_counts() -> None:
    environment = {**SLURM, "SLURM_NTASKS_PER_NODE": "2"}
    del environment["SLURM_STEP_TASKS_PER_NODE"]
    assert place_in(environment).local_size == 2


def test_a_place_is_written_as_torch_and_deepspeed_read_it() -> None:
    environment = {**OPEN_MPI, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    take_place(environment)
    written = {name: environment[name] for name in DEEPSPEED}
    assert written == {**DEEPSPEED, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    assert place_in(environment) == Place(5, 1, 8, 4, "deepspeed or torchrun"), "the same when it is asked again"


def test_a_process_that_nothing_started_is_a_world_of_one() -> None:
    environment: dict[str, str] = {}
    assert take_place(environment) == ALONE
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert 0 < int(environment["MASTER_PORT"]) < 65536
    assert [environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")] == ["0", "0", "1", "1"]


def test_where_the_local_size_is_not_told_none_is_written() -> None:
    environment = {**DEEPSPEED}
    del environment["LOCAL_SIZE"]
    assert take_place(environment).local_size is None
    assert "LOCAL_SIZE" not in environment


def test_under_slurm_the_ranks_meet_on_the_first_node_at_a_port_of_the_job() -> None:
    environment = {**SLURM}
    take_place(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("gpu03", "20123")
    environment = {**SLURM, "MASTER_ADDR": "10.0.0.1"}
    take_place(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "20123")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            OPEN_MPI,
            "MASTER_ADDR and MASTER_PORT: not set for 8 ranks of Open MPI; must be the address of rank 0's host and a "
            "free port there; mpirun -x MASTER_ADDR=… -x MASTER_PORT=29500, or start with dsllm launch",
        ),
        ({**MPICH, "MASTER_ADDR": "a"}, "MASTER_PORT: not set for 8 ranks of MPICH; must be the address of rank 0's"),
        (
            {"RANK": "1"},
            "LOCAL_RANK: not set beside RANK; must be a number, as deepspeed or torchrun sets it; unset RANK, or",
        ),
        ({**DEEPSPEED, "WORLD_SIZE": "many"}, "WORLD_SIZE: given 'many' beside RANK; must be a number, as deepspeed"),
    ],
)
def test_what_is_missing_is_said_in_one_line(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        take_place(dict(environment))
    assert str(refusal.value).startswith(message)
