"""Where the ranks of a launch meet: an address and a port of the first host that every host has tried."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsllm.launch.doctor.finding import Finding
from dsllm.launch.hosts import HostError, Hosts
from dsllm.launch.placement import MASTER_PORT

PREFERRED_PORT = MASTER_PORT
"""Tried first."""
PATIENCE_SECONDS = 3.0
"""A packet that is dropped on the way is sent again after one second and after three: this is time for one loss."""
OPEN_PORTS = "open all TCP ports between the hosts, as gloo and NCCL take any (firewall, security group)"

Tried = dict[str, Any]
"""An agent's `connect`: `error`, or the interface, the own address and the other's."""


@dataclass(frozen=True)
class Rendezvous:
    """What MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME have to be."""

    address: str
    port: int
    interfaces: Mapping[str, str]
    """By host, the interface that leads to the address; a host whose interface has no name is not in it."""
    own_addresses: Mapping[str, str]
    """By host, its own address there."""


def interface_variables(interface: str) -> dict[str, str]:
    """What gloo and NCCL have to be told so that they use this interface and no other.

    Without `=` NCCL takes each whose name begins so, as eth10 for eth1 (NCCL's guide, NCCL_SOCKET_IFNAME); gloo
    compares whole names (gloo/transport/tcp/device.cc).
    """
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


def find_rendezvous(
    hosts: Hosts, names: Sequence[str], preferred_port: int = PREFERRED_PORT
) -> tuple[Rendezvous | None, list[Finding]]:
    """On the first of the hosts `names`, a port that is free, under the first address that all of them reach.

    Tried are the first host's name, as each host resolves it, and then its addresses. None where no address is reached
    by all; the findings say of each host whether it reaches the best one. Takes at most two answers' patience and 6 s.
    """
    first, agent = names[0], hosts.agents[names[0]]
    try:
        port: int = agent.ask("free_port", preferred=preferred_port)
        if len(names) == 1:
            return _alone(first, port)
        own = [address for _, address in agent.ask("addresses") if not address.startswith("127.")]
        word = secrets.token_hex(16)
        agent.ask("listen", port=port, word=word)
    except HostError as error:
        return None, [Finding(first, "port", "failed", f"cannot listen: {error.words}", f"look at {first}")]
    try:
        tried = _try_all(hosts, names, list(dict.fromkeys([first, *own])), port, word)
    finally:
        _leave(hosts, first, port)
    return _judge(first, port, tried)


def _alone(host: str, port: int) -> tuple[Rendezvous, list[Finding]]:
    """One host meets itself."""
    return Rendezvous("127.0.0.1", port, {host: "lo"}, {host: "127.0.0.1"}), [
        Finding(host, "port", "passed", str(port))
    ]


def _try_all(
    hosts: Hosts, names: Sequence[str], candidates: list[str], port: int, word: str
) -> dict[str, dict[str, Tried]]:
    """By candidate, how each host fared."""
    answers = hosts.ask_all(
        "reach",
        each={name: {} for name in names},
        targets=[[candidate, port] for candidate in candidates],
        word=word,
        patience=PATIENCE_SECONDS,
    )
    return {
        candidate: {
            name: {"error": answer.words} if isinstance(answer, HostError) else answer[number]
            for name, answer in answers.items()
        }
        for number, candidate in enumerate(candidates)
    }


def _leave(hosts: Hosts, first: str, port: int) -> None:
    """Let the port go; a host that is lost has let it go."""
    hosts.ask_all("unlisten", each={first: {}}, port=port)


def _judge(first: str, port: int, tried: Mapping[str, Mapping[str, Tried]]) -> tuple[Rendezvous | None, list[Finding]]:
    """The first candidate that all reach; else the one that most do, and why the others do not."""
    unreached = {
        candidate: {host: words for host, one in by_host.items() if (words := _why_not(one)) is not None}
        for candidate, by_host in tried.items()
    }
    best = min(unreached, key=lambda candidate: len(unreached[candidate]))
    if len(unreached[best]) == len(tried[best]):
        return None, _reached_by_none(first, port, unreached[best])
    findings = [_finding(first, best, port, host, unreached[best].get(host)) for host in tried[best]]
    if unreached[best]:
        return None, findings
    return _meeting_at(best, port, tried[best]), findings


def _reached_by_none(first: str, port: int, unreached: Mapping[str, str]) -> list[Finding]:
    """The first host is to blame, and of the others nothing is known."""
    found = f"nobody reaches its port {port}, not even itself: {unreached[first]}"
    others = [Finding(host, "port", "skipped", f"{first} cannot be reached") for host in unreached if host != first]
    return [Finding(first, "port", "failed", found, OPEN_PORTS), *others]


def _why_not(tried: Tried) -> str | None:
    """None where the host reached the candidate, in a way that the others can come back on."""
    if tried["error"] is not None:
        return str(tried["error"])
    if (
        tried["address"].startswith("127.") or tried["address"] == "::1"
    ):  # an entry 127.0.1.1 for the own name in /etc/hosts
        return f"its name leads to {tried['address']} there, which no other host reaches"
    return None


def _finding(first: str, candidate: str, port: int, host: str, why_not: str | None) -> Finding:
    if why_not is None:
        return Finding(host, "port", "passed", str(port))
    at = first if candidate == first else f"{first} ({candidate})"
    return Finding(host, "port", "failed", f"cannot reach port {port} of {at}: {why_not}", OPEN_PORTS)


def _meeting_at(candidate: str, port: int, tried: Mapping[str, Tried]) -> Rendezvous:
    """The address behind a name where it is one for all, so that no rank has to resolve it."""
    peers = Counter(one["peer"] for one in tried.values())
    address = candidate if len(peers) > 1 else next(iter(peers))
    return Rendezvous(
        address,
        port,
        interfaces={host: one["interface"] for host, one in tried.items() if one["interface"] is not None},
        own_addresses={host: one["address"] for host, one in tried.items()},
    )
