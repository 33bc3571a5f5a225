"""Whether the hosts reach each other on any port, as gloo and NCCL need it, beyond the one that ranks meet on."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsllm.launch.doctor.finding import Finding, listed
from dsllm.launch.doctor.rendezvous import OPEN_PORTS, PATIENCE_SECONDS
from dsllm.launch.hosts import HostError, Hosts

NEIGHBOURS = 16
"""Hosts after it that each host tries, round the list: of up to 17 hosts every pair both ways."""


def find_unreached(hosts: Hosts, addresses: Mapping[str, str]) -> list[Finding]:
    """Hosts, given with their addresses, that others do not reach, or that do not reach others.

    An agent that is lost meanwhile is left to whoever asks it next.
    """
    ports = _answered(hosts.ask_all("free_port", each={name: {} for name in addresses}, preferred=0))
    word = secrets.token_hex(16)
    named = {name: {"port": port} for name, port in ports.items()}
    listening = _answered(hosts.ask_all("listen", each=named, word=word))
    neighbours = _neighbours(list(listening))
    try:
        tried = hosts.ask_all(
            "reach",
            each={
                name: {"targets": [[addresses[other], ports[other]] for other in others]}
                for name, others in neighbours.items()
            },
            word=word,
            patience=PATIENCE_SECONDS,
        )
    finally:
        hosts.ask_all("unlisten", each={name: named[name] for name in listening})
    return _blame(
        {
            (name, other): f"port {ports[other]}: {one['error']}"
            for name, found in _answered(tried).items()
            for other, one in zip(neighbours[name], found, strict=True)
            if one["error"] is not None
        }
    )


def _answered(answers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: answer for name, answer in answers.items() if not isinstance(answer, HostError)}


def _neighbours(names: list[str]) -> dict[str, list[str]]:
    """For each host the next ones, round the list."""
    ring = names + names
    most = min(NEIGHBOURS, len(names) - 1)
    return {name: ring[number + 1 : number + 1 + most] for number, name in enumerate(names)}


def _blame(unreached: Mapping[tuple[str, str], str]) -> list[Finding]:
    """By `(from, to)`, why not. Of a pair the host to blame is that in most such pairs; else the one that lets nobody
    in, which is what firewalls do."""
    times = Counter(host for pair in unreached for host in pair)
    blamed: dict[str, list[tuple[str, str]]] = {}
    for pair in unreached:
        host = max(reversed(pair), key=lambda host: times[host])
        blamed.setdefault(host, []).append(pair)
    findings = []
    for host, pairs in blamed.items():
        callers = [caller for caller, other in pairs if other == host]
        called = [other for _, other in pairs]
        why = unreached[pairs[0]]
        words = f"{listed(callers)} cannot reach it" if callers else f"it cannot reach {listed(called)}"
        findings.append(Finding(host, "port", "failed", f"{words} ({why})", OPEN_PORTS))
    return findings
