"""What the ranks of each host are told, from what the doctor has found there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsllm.errors import DsllmError
from dsllm.launch.doctor.doctor import Report
from dsllm.launch.doctor.finding import Finding
from dsllm.launch.doctor.rendezvous import Rendezvous
from dsllm.launch.hostfile import Host
from dsllm.launch.launchers import Launcher
from dsllm.launch.readiness import _left_out, _of_host, _used_hosts
from dsllm.launch.run_plan import RunPlan
from dsllm.launch.topology import Topology
from dsllm.spec.load import load_spec

HOSTS = tuple(Host(name, 1) for name in ("a", "b", "c"))
TOPOLOGY = Topology(HOSTS, hostfile="hosts", listed=HOSTS)
PLAN = RunPlan("quickstart", load_spec("quickstart"), Path("run"), launcher="ssh")
MEETING = Rendezvous("10.0.0.1", 29500, {"a": "eth1"}, {})


class Limited:
    """Facts of a host whose session may use some of its GPUs."""

    def devices(self, host: Host) -> str:
        return ",".join(str(4 + slot) for slot in host.slot_ids)


def report(*findings: Finding, **facts: Any) -> Report:
    return Report(("a", "b", "c"), facts, findings, MEETING)


@pytest.mark.parametrize(
    ("launcher", "told"), [("slurm", None), ("pdsh", "5,7"), ("ssh", "5,7"), ("openmpi", "5,7"), ("torchrun", "5,7")]
)
def test_ranks_are_told_the_gpus_that_a_session_on_their_host_may_use(launcher: Launcher, told: str | None) -> None:
    """But for Slurm, whose ranks choose in a shell of their own."""
    own = _of_host(replace(PLAN, launcher=launcher), Host("a", 2, (1, 3)), MEETING, report(a=Limited()))
    assert own.get("CUDA_VISIBLE_DEVICES") == told


def test_gloo_and_nccl_are_told_the_interface_unless_the_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert _of_host(PLAN, HOSTS[0], MEETING, report()) == {
        "GLOO_SOCKET_IFNAME": "eth1",
        "NCCL_SOCKET_IFNAME": "=eth1",
    }
    assert _of_host(PLAN, HOSTS[1], MEETING, report()) == {}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert _of_host(PLAN, HOSTS[0], MEETING, report()) == {"GLOO_SOCKET_IFNAME": "eth1"}


def test_hosts_are_left_out_with_their_reasons_as_many_as_may_be() -> None:
    found = report(Finding("b", "reach", "failed", "Connection refused", "start sshd there"))
    used = _used_hosts(PLAN, TOPOLOGY, found, min_hosts=1)
    assert used.names == ["a", "c"]
    assert _left_out(PLAN, TOPOLOGY, used, found) == ("b: left out: Connection refused; start sshd there",)


def test_a_host_that_the_batch_does_not_divide_over_is_left_out_with_that_reason() -> None:
    used = _used_hosts(PLAN, TOPOLOGY, report(), min_hosts=1)  # 16 sequences, 8 at a time
    assert used.names == ["a", "b"]
    (line,) = _left_out(PLAN, TOPOLOGY, used, report())
    assert line == "c: left out: the global batch does not divide over it too"


def test_too_few_hosts_are_told_with_what_is_wrong() -> None:
    found = report(Finding("b", "space", "failed", "full", "make room"))
    with pytest.raises(DsllmError, match=r"^b: full; make room; dsllm doctor says more, --no-doctor starts"):
        _used_hosts(PLAN, TOPOLOGY, found, min_hosts=None)
    with pytest.raises(DsllmError, match=r"^2 hosts are ready, --min-hosts 3: b: full; make room"):
        _used_hosts(PLAN, TOPOLOGY, found, min_hosts=3)
