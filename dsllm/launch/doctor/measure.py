"""Starts `dsllm.engine.links` on every host at once, and takes what it found."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dsllm.launch.doctor.facts import Links
from dsllm.launch.doctor.finding import Finding
from dsllm.launch.doctor.link import judge_links
from dsllm.launch.doctor.rendezvous import OPEN_PORTS, Rendezvous, interface_variables
from dsllm.launch.hostfile import Host
from dsllm.launch.hosts import ANSWER_SECONDS, HostError, Hosts
from dsllm.launch.launchers import TRAIN_SCRIPT

LINK_SECONDS = 60.0
"""For the whole measurement; two healthy hosts take 5 s, of which the import of torch is 2."""
MEETING_SECONDS = 30.0
"""For a host to hear of another: one that cannot be heard of is told of before the limit."""


def measure_links(
    hosts: Hosts, measured: Sequence[Host], rendezvous: Rendezvous, on_cpu: bool
) -> tuple[Links | None, list[Finding]]:
    """One rank on each of these hosts, two or more, the first of which the rendezvous is on."""
    names = [host.name for host in measured]
    ranks = _ranks(measured, rendezvous, on_cpu)
    outputs: dict[str, Any] = hosts.ask_all("run", LINK_SECONDS + ANSWER_SECONDS, ranks)
    failed = {name: why for name in names if (why := _why_failed(outputs[name])) is not None}
    if failed:
        return None, [Finding(name, "link", "failed", why, _remedy(why)) for name, why in failed.items()]
    links = Links.from_output(json.loads(outputs[names[0]]["stdout"].splitlines()[-1]), names)
    return links, judge_links(links, names, rendezvous.interfaces)


def _ranks(hosts: Sequence[Host], rendezvous: Rendezvous, on_cpu: bool) -> dict[str, dict[str, Any]]:
    """What the agent of each host is to run."""
    shared = {
        "WORLD_SIZE": str(len(hosts)),
        "MASTER_ADDR": rendezvous.address,
        "MASTER_PORT": str(rendezvous.port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "dsllm.engine.links", "gloo" if on_cpu else "nccl", str(MEETING_SECONDS)]
    ranks = {}
    for rank, host in enumerate(hosts):
        interface = rendezvous.interfaces.get(host.name)
        named = {} if interface is None else interface_variables(interface)
        ranks[host.name] = {
            "command": command,
            "environment": {**shared, **named, "RANK": str(rank), "LOCAL_RANK": str(host.slot_ids[0])},
            "folder": str(TRAIN_SCRIPT.parent.parent),  # -m finds it there before any other
            "limit": LINK_SECONDS,
        }
    return ranks


def _why_failed(output: Mapping[str, Any] | HostError) -> str | None:
    """None of a rank that ended well."""
    if isinstance(output, HostError):
        return output.words
    if output["status"] is None:
        return f"measuring took longer than {LINK_SECONDS:.0f} s"
    if output["status"] != 0:
        lines = [line for line in output["stderr"].splitlines() if line.strip()]
        return lines[-1].strip()[:200] if lines else f"measuring ended with status {output['status']}"
    return None


def _remedy(why: str) -> str:
    """Most that goes wrong after a port was reached is another port that is not."""
    return "see the network there" if "longer" in why else OPEN_PORTS
