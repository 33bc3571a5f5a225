"""The deepspeed command that a launch starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dsllm.errors import UserError
from dsllm.launch.command import (
    TRAIN_SCRIPT,
    count_gpus,
    deepspeed_executable,
    hostfile_topology,
    launch_command,
    launch_environment,
    local_topology,
    train_arguments,
)
from dsllm.launch.hostfile import Host

EIGHTS = [Host("a", 8), Host("b", 8)]


@pytest.fixture(autouse=True)
def _every_gpu_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_local_command_names_its_ranks_its_port_and_the_installed_script() -> None:
    command = launch_command(local_topology(4, gpus=8), 29501, ["--spec", "1b"])
    assert command[1:5] == ["--num_gpus", "4", "--master_port", "29501"]
    assert command[-3:] == [str(TRAIN_SCRIPT), "--spec", "1b"]


def test_the_launcher_is_the_one_beside_this_python() -> None:
    beside = Path(sys.executable).parent / "deepspeed"
    assert deepspeed_executable() == (str(beside) if beside.exists() else "deepspeed")


def test_every_gpu_is_used_unless_fewer_are_asked_for() -> None:
    assert local_topology(None, gpus=8).world_size == 8
    assert local_topology(2, gpus=8).world_size == 2


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="--num-gpus: given 9; this machine has 8; ask for 8 or fewer"):
        local_topology(9, gpus=8)


def test_without_a_gpu_the_cpu_runs_two_ranks_or_as_many_as_asked_for() -> None:
    assert local_topology(None, gpus=0).world_size in (1, 2)
    assert local_topology(3, gpus=0).world_size == 3
    assert launch_environment(local_topology(None, gpus=0)) == {"DS_ACCELERATOR": "cpu"}
    assert launch_environment(local_topology(None, gpus=1)) == {}


def test_the_slots_of_a_hostfile_make_the_world() -> None:
    topology = hostfile_topology("hosts", EIGHTS, None, None, gpus=8)
    assert topology.world_size == 16
    assert launch_command(topology, 29500, [])[1:5] == ["--hostfile", "hosts", "--num_nodes", "2"]
    assert "--num_gpus" not in launch_command(topology, 29500, [])


def test_fewer_nodes_and_fewer_ranks_can_be_asked_for() -> None:
    topology = hostfile_topology("hosts", [*EIGHTS, Host("c", 8)], 2, 4, gpus=8)
    assert topology.world_size == 8
    assert launch_command(topology, 29500, [])[1:7] == ["--hostfile", "hosts", "--num_nodes", "2", "--num_gpus", "4"]


def test_a_single_host_that_is_another_machine_is_not_run_here() -> None:
    topology = hostfile_topology("hosts", EIGHTS, 1, None, gpus=8)
    assert launch_command(topology, 29500, [])[1:6] == ["--hostfile", "hosts", "--num_nodes", "1", "--force_multi"]


def test_a_single_host_that_is_this_machine_needs_no_ssh() -> None:
    topology = hostfile_topology("hosts", [Host("localhost", 8)], None, None, gpus=8)
    assert launch_command(topology, 29500, [])[1:3] == ["--num_gpus", "8"]


def test_more_nodes_than_the_hostfile_lists_are_refused() -> None:
    with pytest.raises(UserError, match="--num-nodes: given 3; hosts lists 2 hosts"):
        hostfile_topology("hosts", EIGHTS, 3, None, gpus=8)


def test_more_ranks_than_slots_are_refused() -> None:
    with pytest.raises(UserError, match="--num-gpus: given 9; host 'a' of hosts has 8 slots; ask for 8 or fewer"):
        hostfile_topology("hosts", EIGHTS, None, 9, gpus=8)


def test_hosts_with_different_slots_need_a_number() -> None:
    uneven = [Host("a", 8), Host("b", 4)]
    with pytest.raises(UserError, match=r"different slots \(a 8, b 4\) need one number of ranks; add --num-gpus 4"):
        hostfile_topology("hosts", uneven, None, None, gpus=8)
    assert hostfile_topology("hosts", uneven, None, 4, gpus=8).world_size == 8


def test_train_arguments_leave_defaults_out_and_keep_the_order_of_overrides() -> None:
    assert train_arguments("1b", None, "auto", []) == ["--spec", "1b"]
    assert train_arguments("1b", "out", "never", ["seed=1", "zero.stage=3"]) == (
        ["--spec", "1b", "--run-dir", "out", "--resume", "never", "--set", "seed=1", "--set", "zero.stage=3"]
    )
    assert train_arguments("1b", None, "auto", [], "3h50m") == ["--spec", "1b", "--stop-after", "3h50m"]


@pytest.mark.parametrize(("listed", "count"), [("0,1,2", 3), ("", 0), ("-1", 0), ("GPU-3f2a", 1)])
def test_visible_devices_limit_the_gpus(monkeypatch: pytest.MonkeyPatch, listed: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert count_gpus() == count


def test_a_selection_of_gpus_is_kept_and_narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    topology = local_topology(2, gpus=count_gpus())
    assert launch_environment(topology) == {"CUDA_VISIBLE_DEVICES": "4,5"}
    assert "--num_gpus" not in launch_command(topology, 29500, [])
