"""The srun commands, and what the variables of a Slurm job say."""

from __future__ import annotations

import os
import signal
import socket
import subprocess

import pytest

from dsllm.errors import UserError
from dsllm.launch.hostfile import Host
from dsllm.launch.slurm import in_allocation_order, needs_srun, refuse_unlike_gpus, srun_command, srun_one


def test_every_rank_is_a_task_and_hosts_are_filled_in_order() -> None:
    command = srun_command([Host("gpu-1", 8), Host("gpu-2", 8)], 4, ["python", "-u", "train.py"], {})
    assert command[0] == "srun"
    assert {
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--nodelist=gpu-1,gpu-2",
        "--distribution=block",
        "--kill-on-bad-exit=1",
        "--gpu-bind=none",
        "--export=ALL",
    } <= set(command)
    assert command[-7:] == ["sh", "-c", "trap '' USR1 USR2; exec \"$@\"", "sh", "python", "-u", "train.py"]


def test_a_shell_on_one_host_shares_the_resources_of_the_ranks() -> None:
    command = srun_one("gpu-2", "cat > 'a b'; echo $HOME", {})
    assert {"--overlap", "--nodes=1", "--ntasks=1", "--nodelist=gpu-2"} <= set(command)
    assert command[-3:] == ["sh", "-c", "trap '' USR1 USR2; cat > 'a b'; echo $HOME"]
    assert "--input=none" not in command


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_what_srun_starts_outlives_a_signal_that_it_does_not_answer_yet(number: signal.Signals) -> None:
    hurt = ["sh", "-c", f"kill -{number.name.removeprefix('SIG')} $$; echo alive"]
    rank = srun_command([Host("a", 1)], 1, hurt, {})
    shell = srun_one("a", hurt[-1], {})
    for command in (rank, shell):
        ran = subprocess.run(command[command.index("sh") :], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (0, "alive\n")


def test_options_of_the_job_that_srun_would_take_over_are_left_out() -> None:
    environment = {"SLURM_GPUS": "16", "SLURM_GPUS_PER_TASK": "1", "SLURM_JOB_ID": "7", "PATH": "/bin"}
    expected = ["env", "-u", "SLURM_GPUS", "-u", "SLURM_GPUS_PER_TASK", "srun"]
    assert srun_command([Host("a", 8)], 8, ["true"], environment)[:6] == expected
    assert srun_one("a", "true", environment)[:6] == expected


def test_hosts_come_in_the_order_in_which_srun_has_them() -> None:
    hosts = [Host("gpu3", 8), Host("gpu1", 2, (0, 3))]
    assert in_allocation_order(hosts, {"SLURM_JOB_NODELIST": "gpu[1-3]"}) == [hosts[1], hosts[0]]


def test_a_host_outside_the_job_is_refused() -> None:
    with pytest.raises(UserError, match=r"host 'b': not one of this Slurm job's, which are gpu\[1-3\]; name hosts as"):
        in_allocation_order([Host("b", 8)], {"SLURM_JOB_NODELIST": "gpu[1-3]"})


@pytest.mark.parametrize(
    ("set_by_slurm", "seen"),
    [("0,1,2,3", "1,3"), ("4,5,6,7", "5,7"), ("GPU-a,GPU-b,GPU-c,GPU-d", "GPU-b,GPU-d"), (None, "1,3"), ("0", "")],
)
def test_chosen_gpus_are_those_of_the_list_that_slurm_sets_in_a_task(set_by_slurm: str | None, seen: str) -> None:
    hosts = [Host("a", 2, (1, 3)), Host("b", 2, (1, 3))]
    command = srun_command(hosts, 2, ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES"], {})
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if set_by_slurm is not None:
        environment["CUDA_VISIBLE_DEVICES"] = set_by_slurm
    ran = subprocess.run(command[command.index("sh") :], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, f"{seen}\n")


def test_gpus_that_differ_from_host_to_host_are_refused() -> None:
    refuse_unlike_gpus([Host("a", 2, (0, 2)), Host("b", 2, (0, 2))])
    with pytest.raises(UserError) as refusal:
        refuse_unlike_gpus([Host("a", 2), Host("b", 2, (2, 3))])
    assert str(refusal.value) == (
        "--include or --exclude: given GPUs 0,1 of host 'a' and 2,3 of 'b'; must be the same of every host of a Slurm "
        "job; choose the same, or leave whole hosts out"
    )


@pytest.mark.parametrize(
    ("machine", "nodes", "variables", "expected"),
    [
        ("gpu1", "gpu1", {}, False),
        ("gpu1.cluster", "gpu1", {}, False),
        ("gpu1", "gpu1.cluster", {}, False),
        ("ip-10-0-0-7", "gpu1", {"SLURMD_NODENAME": "gpu1"}, False),
        ("login", "gpu1", {}, True),
        ("login.cluster", "gpu1.cluster", {}, True),
        ("login", "gpu1", {"SLURMD_NODENAME": "gpu9"}, True),  # of a job inside which salloc was called
        ("gpu1", "gpu[1-2]", {}, True),
        ("gpu1", "gpu[1-2]", {"SLURM_STEP_ID": "0"}, False),
        ("login", "gpu1", {"SLURM_STEP_ID": "0"}, False),
        ("login", "gpu1", {"SLURM_STEP_ID": "4294967290"}, True),
    ],
)
def test_a_run_in_a_job_is_never_one_on_the_login_node_alone(
    monkeypatch: pytest.MonkeyPatch, machine: str, nodes: str, variables: dict[str, str], expected: bool
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: machine)
    num_nodes = "2" if "[" in nodes else "1"
    assert needs_srun({"SLURM_JOB_NODELIST": nodes, "SLURM_JOB_NUM_NODES": num_nodes, **variables}) is expected


def test_outside_a_job_no_srun_is_needed() -> None:
    assert not needs_srun({})
