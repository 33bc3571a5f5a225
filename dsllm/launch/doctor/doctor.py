"""Examines every host of a launch at once, before its ranks start there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsllm.launch.doctor.facts import Facts
from dsllm.launch.doctor.finding import Finding, bad_hosts
from dsllm.launch.doctor.rendezvous import PREFERRED_PORT, Rendezvous, find_rendezvous
from dsllm.launch.hostfile import Host
from dsllm.launch.hosts import Hosts, on_this_machine, over_ssh
from dsllm.launch.topology import is_this_machine
from dsllm.spec.sections import Spec


@dataclass(frozen=True)
class Wanted:
    """What the hosts are wanted for."""

    hosts: tuple[Host, ...]
    spec: Spec | None = None
    spec_file: Path | None = None
    """Where the spec is a file, rather than a preset: it has to be the same on every host."""
    run_dir: Path = Path("runs")
    on_cpu: bool | None = None
    """None: whether no host has a GPU."""
    port: int = PREFERRED_PORT


@dataclass(frozen=True)
class Report:
    """What was found on the hosts, in the order of the hostfile."""

    hosts: tuple[str, ...]
    facts: Mapping[str, Facts]
    """Of those that answered."""
    findings: tuple[Finding, ...]
    rendezvous: Rendezvous | None
    """None where not all hosts that answered reach one address."""
    seconds: float = 0.0
    on_cpu: bool = False
    links: None = field(default=None)

    @property
    def failed(self) -> dict[str, list[Finding]]:
        """What stands against a start, by host."""
        return bad_hosts(self.findings)

    @property
    def healthy(self) -> list[str]:
        """Hosts that nothing speaks against."""
        return [host for host in self.hosts if host not in self.failed]

    @property
    def is_ready(self) -> bool:
        return not self.failed


def way_to(host: str, line: str) -> list[str]:
    """A `Way`: ssh, which this machine does not need to itself."""
    return on_this_machine(host, line) if is_this_machine(host) else over_ssh(host, line)


def examine(hosts: Hosts, wanted: Wanted, quick: bool = True) -> Report:
    """All checks of the hosts in `wanted`; `quick` leaves out the measurement of the links between them.

    Each question has its time limit, and a host that does not answer one is asked no other.
    """
    started = time.monotonic()
    names = [host.name for host in wanted.hosts]
    rendezvous, findings = find_rendezvous(hosts, names, wanted.port)
    return Report(tuple(names), {}, tuple(findings), rendezvous, time.monotonic() - started)


def verdict(report: Report) -> str:
    """One line: `2 hosts, ready`, or the hosts that are not."""
    count = f"{len(report.hosts)} hosts" if len(report.hosts) > 1 else report.hosts[0]
    if report.is_ready:
        return f"{count}, ready"
    return f"{_listed(list(report.failed))}: not ready"


def _listed(hosts: Sequence[str], most: int = 5) -> str:
    """`a, b, c`, and a count of the rest of a long list."""
    more = f" and {len(hosts) - most} more" if len(hosts) > most else ""
    return ", ".join(hosts[:most]) + more
