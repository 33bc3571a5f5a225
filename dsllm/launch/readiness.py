"""Hosts are made ready for the ranks of one start: asked, chosen, guarded, and told the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsllm.errors import DsllmError, UserError
from dsllm.launch import environment
from dsllm.launch.doctor.doctor import Report, Wanted, examine
from dsllm.launch.doctor.rendezvous import PREFERRED_PORT, Rendezvous, find_rendezvous, interface_variables
from dsllm.launch.expectations import EXPECTED
from dsllm.launch.hostfile import Host
from dsllm.launch.hosts import HostError, Hosts, on_this_machine
from dsllm.launch.launchers import Launcher, Meeting, way_to_hosts
from dsllm.launch.run_plan import RunPlan
from dsllm.launch.slurm_job import rendezvous_port
from dsllm.launch.topology import THIS_MACHINE, Topology
from dsllm.plan.batch import check_batch
from dsllm.spec.sections import Spec

LISTED = 5
"""Of many problems in one line, the first."""
OWN_PORTS = 1000
"""Ports that launches choose from, so that two on the same hosts seldom take the same."""
SETS_MEETING: tuple[Launcher, ...] = ("local", "pdsh", "ssh", "torchrun")
"""Launchers that tell their ranks themselves where to meet."""


@dataclass(frozen=True)
class Readiness:
    """What a start needs to know of its hosts."""

    topology: Topology
    """Of the hosts that are used; it knows now whether ranks compute on the CPU."""
    meeting: Meeting
    variables: dict[str, dict[str, str]]
    """What each host tells its ranks."""
    left_out: tuple[str, ...] = ()
    """Hosts that are not used, each with the reason, in a line."""


def open_hosts(plan: RunPlan, topology: Topology) -> Hosts:
    """Agents on the hosts of a launch; on this machine alone where nobody else is to be asked."""
    if plan.asks_nobody:
        return Hosts([THIS_MACHINE], on_this_machine)
    return Hosts(topology.names, way_to_hosts(plan.launcher, topology))


def needs_file(launcher: Launcher, topology: Topology) -> bool:
    """Whether the ranks' environment travels in a private file; otherwise it is inherited, or Slurm hands it on."""
    return not topology.is_local and launcher != "slurm"


def make_ready(plan: RunPlan, topology: Topology, hosts: Hosts, launch: str, min_hosts: int | None) -> Readiness:
    """Find out which hosts can run the ranks and where those can meet, and guard the launch there.

    Of hosts that are not ready so many may be left out that `min_hosts` remain, none when it is None. Raises DsllmError
    where more are not, naming what is wrong.
    """
    port = plan.port or PREFERRED_PORT + int(launch, 16) % OWN_PORTS
    if topology.is_local:
        _guard(hosts, launch)
        free: int = hosts.agents[THIS_MACHINE].ask("free_port", preferred=port)
        return _ready(plan, topology, Meeting("127.0.0.1", free), launch)
    if plan.asks_nobody:
        _guard(hosts, launch)
        return _ready(plan, topology, Meeting(topology.names[0], rendezvous_port(os.environ)), launch)
    report = examine(hosts, _wanted(plan, topology, port), quick=True)
    used = _used_hosts(plan, topology, report, min_hosts)
    rendezvous = report.rendezvous
    if used != topology or rendezvous is None:
        hosts.leave_out(set(topology.names) - set(used.names))
        rendezvous = _meet_again(hosts, used, port)
    _guard(hosts, launch)
    left_out = _left_out(plan, topology, used, report)
    used = replace(used, on_cpu=report.on_cpu)
    own = {host.name: _of_host(plan, host, rendezvous, report) for host in used.hosts}
    ready = _ready(plan, used, Meeting(rendezvous.address, rendezvous.port), launch, own)
    return replace(ready, left_out=left_out)


def forwarded(spec: Spec) -> dict[str, str]:
    """This process's variables that go along to every host, and those that DeepSpeed would read from its own file."""
    own = environment.selected(os.environ, spec.launch.environment)
    return {**environment.read_deepspeed_env(Path.cwd(), Path.home(), os.environ), **own}


def hand_out(hosts: Hosts, launch: str, variables: Mapping[str, Mapping[str, str]]) -> str:
    """Write each host's variables into its private file. Returns the file's path, the same on every host."""
    each = {name: {"text": environment.as_text(told)} for name, told in variables.items()}
    answers = list(hosts.ask_all("write_private", each=each, launch=launch).values())
    failed = [str(answer) for answer in answers if isinstance(answer, HostError)]
    if failed:
        raise DsllmError(f"{_listed(failed)}; the private environment is written below /tmp: make room there")
    return str(answers[0])


def _guard(hosts: Hosts, launch: str) -> None:
    answers = hosts.ask_all("guard", launch=launch).values()
    if lost := [str(answer) for answer in answers if isinstance(answer, HostError)]:
        raise DsllmError(f"{_listed(lost)}; mend it, or leave the host out with --exclude; dsllm doctor says more")


def _wanted(plan: RunPlan, topology: Topology, port: int) -> Wanted:
    """What the doctor is to look at."""
    return Wanted(
        hosts=topology.hosts,
        spec=plan.spec,
        shape=plan.shape,
        spec_file=plan.spec_file,
        run_dir=plan.run_dir,
        on_cpu=topology.on_cpu,
        port=port,
    )


def _used_hosts(plan: RunPlan, topology: Topology, report: Report, min_hosts: int | None) -> Topology:
    """The hosts that nothing speaks against, as many as the global batch divides over."""
    bad = report.against(plan.asks_doctor)
    ready = [host for host in topology.hosts if host.name not in bad]
    fewest = topology.num_hosts if min_hosts is None else min_hosts
    for number in range(len(ready), fewest - 1, -1):
        if _divides(plan, number * topology.ranks_per_host):
            return replace(topology, hosts=tuple(ready[:number]))
    found = _listed([f"{name}: {one.found}; {one.remedy}" for name, findings in bad.items() for one in findings])
    why = found or "the global batch does not divide over any number of hosts from there on"
    left = "" if min_hosts is None else f"{len(ready)} hosts are ready, --min-hosts {min_hosts}: "
    raise DsllmError(f"{left}{why}; dsllm doctor says more, --no-doctor starts all the same where that is possible")


def _left_out(plan: RunPlan, topology: Topology, used: Topology, report: Report) -> tuple[str, ...]:
    bad = report.against(plan.asks_doctor)
    reasons = {name: f"{findings[0].found}; {findings[0].remedy}" for name, findings in bad.items()}
    unused = [name for name in topology.names if name not in used.names]
    not_divided = "the global batch does not divide over it too"
    return tuple(f"{name}: left out: {reasons.get(name, not_divided)}" for name in unused)


def _divides(plan: RunPlan, world_size: int) -> bool:
    try:
        check_batch(plan.spec.batch, world_size)
    except UserError:
        return False
    return True


def _meet_again(hosts: Hosts, topology: Topology, port: int) -> Rendezvous:
    """Where the hosts can meet that are left."""
    rendezvous, findings = find_rendezvous(hosts, topology.names, port)
    if rendezvous is None:
        failed = [f"{one.host}: {one.found}; {one.remedy}" for one in findings if one.outcome == "failed"]
        raise DsllmError(f"{_listed(failed)}; dsllm doctor says more")
    return rendezvous


def _of_host(plan: RunPlan, host: Host, rendezvous: Rendezvous, report: Report) -> dict[str, str]:
    """What only this host's ranks are told: the interface that leads to the others, unless the user has named one, and
    their GPUs where these are not all. DeepSpeed's launcher sets them too, but knows of no limit of the session."""
    told = {}
    if (interface := rendezvous.interfaces.get(host.name)) is not None:
        told = {name: value for name, value in interface_variables(interface).items() if name not in os.environ}
    devices = report.facts[host.name].devices(host) if host.name in report.facts else None
    if devices is not None and plan.launcher != "slurm":  # which chooses them in the shell of each rank
        told["CUDA_VISIBLE_DEVICES"] = devices
    return told


def _ready(
    plan: RunPlan,
    topology: Topology,
    meeting: Meeting,
    launch: str,
    own: Mapping[str, Mapping[str, str]] | None = None,
) -> Readiness:
    """Everything that the ranks of each host have to be told; `own` is what one host's alone are."""
    common = {} if topology.is_local else forwarded(plan.spec)
    common |= {environment.LAUNCH: launch, EXPECTED: str(topology.world_size)}
    if topology.on_cpu:
        common["DS_ACCELERATOR"] = "cpu"
    if plan.launcher not in SETS_MEETING:
        common |= {"MASTER_ADDR": meeting.address, "MASTER_PORT": str(meeting.port)}
    told = {name: {**common, **(own[name] if own else {})} for name in topology.names}
    return Readiness(topology, meeting, told)


def _listed(problems: Sequence[str]) -> str:
    """In one line, of many only the first."""
    more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "; ".join(problems[:LISTED]) + more
