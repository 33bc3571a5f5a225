"""Where ranks run: this machine's GPUs, or equally many ranks on the hosts of a hostfile."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dsllm.errors import UserError
from dsllm.launch.hostfile import Host
from dsllm.launch.topology import (
    Topology,
    count_gpus,
    hostfile_topology,
    hosts_topology,
    is_this_machine,
    local_topology,
)

EIGHTS = [Host("a", 8), Host("b", 8)]


@pytest.fixture(autouse=True)
def _every_gpu_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("a slots=8\nb slots=8\n")
    return str(path)


def test_every_gpu_is_used_unless_fewer_are_asked_for() -> None:
    assert local_topology(None, gpus=8).world_size == 8
    assert local_topology(2, gpus=8).world_size == 2
    assert local_topology(2, gpus=8).on_cpu is False


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="--num-gpus: given 9; this machine has 8; ask for 8 or fewer"):
        local_topology(9, gpus=8)


def test_without_a_gpu_the_cpu_runs_two_ranks_or_as_many_as_asked_for() -> None:
    assert local_topology(None, gpus=0).world_size in (1, 2)
    assert local_topology(3, gpus=0).world_size == 3
    assert local_topology(3, gpus=0).on_cpu is True


@pytest.mark.parametrize(("listed", "count"), [("0,1,2", 3), ("", 0), ("-1", 0), ("GPU-3f2a", 1), (" 0 , 1 ", 2)])
def test_visible_devices_limit_the_gpus(monkeypatch: pytest.MonkeyPatch, listed: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert count_gpus() == count


@pytest.mark.parametrize(
    ("script", "count"),
    [
        ("echo 'GPU 0: NVIDIA H100'; echo '  MIG 1g.10gb Device 0:'; echo 'GPU 1: NVIDIA H100'", 2),
        ("echo 'NVIDIA-SMI has failed'; exit 9", 3),
        ("exec sleep 5", 3),
        (None, 3),
    ],
)
def test_a_driver_that_fails_or_hangs_does_not_turn_a_run_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, count: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl"):
        (tmp_path / name).touch()
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("dsllm.launch.topology.DEVICES", tmp_path)
    monkeypatch.setattr("dsllm.launch.devices.SECONDS_TO_ANSWER", 0.2)
    assert count_gpus() == count


def test_a_selection_of_gpus_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert local_topology(2, gpus=count_gpus()).devices == ("4", "5", "7")


def test_the_slots_of_hosts_make_the_world_and_their_order_is_that_of_ranks() -> None:
    topology = hosts_topology("hosts", [Host("b", 8), Host("a", 8)])
    assert (topology.names, topology.num_hosts) == (["b", "a"], 2)
    assert (topology.ranks_per_host, topology.world_size) == (8, 16)
    assert topology.on_cpu is None, "the hosts have not been asked"


def test_fewer_nodes_and_fewer_ranks_can_be_asked_for() -> None:
    topology = hosts_topology("hosts", [*EIGHTS, Host("c", 8)], num_nodes=2, num_gpus=4)
    assert topology.hosts == (Host("a", 4), Host("b", 4))


def test_fewer_ranks_of_chosen_slots_are_the_first_of_them() -> None:
    topology = hosts_topology("the job", [Host("a", 3, (2, 4, 6)), Host("b", 8)], num_gpus=2)
    assert topology.hosts == (Host("a", 2, (2, 4)), Host("b", 2))


def test_hosts_and_slots_can_be_chosen_and_left_out() -> None:
    assert hosts_topology("hosts", EIGHTS, include="b").hosts == (Host("b", 8),)
    assert hosts_topology("hosts", EIGHTS, include="a:1,3@b:0,2").hosts == (Host("a", 2, (1, 3)), Host("b", 2, (0, 2)))
    assert hosts_topology("hosts", EIGHTS, exclude="a").hosts == (Host("b", 8),)


def test_more_nodes_than_are_listed_are_refused() -> None:
    with pytest.raises(UserError, match="--num-nodes: given 3; hosts lists 2 hosts; ask for as many or fewer"):
        hosts_topology("hosts", EIGHTS, num_nodes=3)


def test_more_ranks_than_slots_are_refused() -> None:
    with pytest.raises(UserError, match="--num-gpus: given 9; host 'a' of hosts has 8 slots; ask for 8 or fewer"):
        hosts_topology("hosts", EIGHTS, num_gpus=9)


def test_hosts_with_different_slots_need_a_number() -> None:
    uneven = [Host("a", 8), Host("b", 4)]
    with pytest.raises(UserError, match=r"different slots \(a 8, b 4\) need one number of ranks; add --num-gpus 4"):
        hosts_topology("hosts", uneven)
    assert hosts_topology("hosts", uneven, num_gpus=4).world_size == 8


@pytest.mark.parametrize(
    ("option", "choice", "remedy"),
    [
        ("include", "a@b:1,3", "a:1,3@b:1,3"),
        ("include", "a:0,1,2@b:5,6", "a:0,1@b:5,6"),
        ("exclude", "b:0,1,2,3,4,5", "a:6,7@b:6,7"),
    ],
)
def test_chosen_hosts_with_different_slots_are_advised_a_choice_that_works(
    option: str, choice: str, remedy: str
) -> None:
    with pytest.raises(UserError, match=rf"need one number of ranks; choose as many of each: --include {remedy}$"):
        hosts_topology("hosts", EIGHTS, **{option: choice})
    assert hosts_topology("hosts", EIGHTS, include=remedy).ranks_per_host == 2


def test_a_hostfile_is_remembered_with_all_that_it_lists(hostfile: str) -> None:
    topology = hostfile_topology(hostfile, include="b", gpus=0)
    assert topology == Topology((Host("b", 8),), hostfile=hostfile, listed=tuple(EIGHTS))


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", socket.gethostname()])
def test_a_single_host_that_is_this_machine_needs_no_ssh(tmp_path: Path, name: str) -> None:
    (tmp_path / "hosts").write_text(f"{name} slots=8\n")
    topology = hostfile_topology(str(tmp_path / "hosts"), gpus=8)
    assert topology == Topology((Host("localhost", 8),), is_local=True, on_cpu=False)


def test_a_single_host_that_is_another_machine_is_not_run_here(hostfile: str) -> None:
    topology = hostfile_topology(hostfile, num_nodes=1, gpus=8)
    assert (topology.is_local, topology.names) == (False, ["a"])


def test_this_machine_among_others_is_one_of_several_hosts(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\nb slots=2\n")
    topology = hostfile_topology(str(tmp_path / "hosts"), gpus=8)
    assert (topology.is_local, topology.names) == (False, ["localhost", "b"])


def test_more_slots_than_this_machine_has_gpus_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=8\n")
    words = "hosts: given slots=8 for localhost; this machine has 4 GPUs; lower them, or add --num-gpus 4"
    with pytest.raises(UserError, match=words):
        hostfile_topology(str(tmp_path / "hosts"), gpus=4)


def test_another_machine_is_not_taken_for_this_one() -> None:
    assert not is_this_machine("another-machine")
