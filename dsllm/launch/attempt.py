"""One start of a run's ranks: hosts are asked, told the environment, started, watched to the end and swept."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsllm.errors import DsllmError
from dsllm.launch import environment
from dsllm.launch.doctor.doctor import Report, Wanted, examine
from dsllm.launch.doctor.rendezvous import PREFERRED_PORT, interface_variables
from dsllm.launch.ending import Ending, find_ending
from dsllm.launch.history import read_history
from dsllm.launch.hostfile import Host
from dsllm.launch.hosts import HostError, Hosts, on_this_machine
from dsllm.launch.launchers import Launcher, Meeting, Start, starts, train_arguments, way_to_hosts
from dsllm.launch.slurm import rendezvous_port
from dsllm.launch.supervisor import Screen, watch_ranks
from dsllm.launch.topology import THIS_MACHINE, Topology
from dsllm.spec.sections import Spec

LAST_LINES = 20
LISTED_HOSTS = 5
SETS_MEETING: tuple[Launcher, ...] = ("local", "pdsh", "ssh", "torchrun")
"""Launchers that tell their ranks themselves where to meet, and which GPUs of a host are chosen."""


@dataclass(frozen=True)
class Plan:
    """What is to be run, wherever it starts."""

    spec_name: str
    """As the user gave it: a path or a preset."""
    spec: Spec
    run_dir: Path
    given_run_dir: str | None = None
    """As the user gave it; None for the spec's own."""
    overrides: tuple[str, ...] = ()
    launcher: Launcher = "local"
    port: int = PREFERRED_PORT
    """For the ranks to meet at; another one where it is in use."""
    asks_doctor: bool = True
    extra_arguments: tuple[str, ...] = ()
    """For train.py, besides those that follow from the plan."""

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    @property
    def history(self) -> Path:
        return self.run_dir / "history.jsonl"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, and what is left to say of it."""

    ending: Ending
    last_lines: tuple[str, ...] = ()
    """Of the log of the rank that failed first, where that is known and not on screen already."""
    not_swept: tuple[str, ...] = ()
    """Hosts that could not be looked at; their agents end what is left there."""


@dataclass(frozen=True)
class Readiness:
    """What the hosts were found to need."""

    topology: Topology
    """Which knows now whether ranks compute on the CPU."""
    meeting: Meeting
    variables: dict[str, dict[str, str]]
    """What each host tells its ranks."""


def attempt(
    plan: Plan,
    topology: Topology,
    resume: str,
    stop_after: str | None = None,
    *,
    announce: Callable[[str], None],
    screen: Screen | None = None,
) -> Outcome:
    """Start the ranks and wait for their end; `announce` is told the commands that start them.

    Raises DsllmError where a host is not ready, UserError where the launcher is not installed.
    """
    launch = secrets.token_hex(8)
    events_before = len(read_history(plan.history))
    with open_hosts(plan, topology) as hosts:
        ready = make_ready(plan, topology, hosts, launch)
        file = _hand_out(hosts, launch, ready.variables) if needs_file(plan.launcher, topology) else None
        arguments = train_arguments(
            plan.spec_name, plan.given_run_dir, resume, plan.overrides, stop_after, environment_file=file
        )
        planned = starts(plan.launcher, ready.topology, ready.meeting, [*arguments, *plan.extra_arguments], Path.cwd())
        for start in planned:
            announce(start.as_typed())
        if file is None:
            planned = [_with_variables(start, ready.variables) for start in planned]
        watched = watch_ranks(planned, hosts, launch, str(plan.logs), screen)
        ending = find_ending(replace(watched.signs, stopped_by=_stopped_by(plan.history, events_before)))
        return Outcome(ending, _last_lines(plan, hosts, ending), tuple(error.host for error in watched.not_swept))


def open_hosts(plan: Plan, topology: Topology) -> Hosts:
    """Agents on the hosts of a launch. Where Slurm starts the ranks and the hosts are not to be asked, on this machine
    alone: it sees to the job's own end."""
    if _asks_nobody(plan):
        return Hosts([THIS_MACHINE], on_this_machine)
    return Hosts(topology.names, way_to_hosts(plan.launcher, topology))


def needs_file(launcher: Launcher, topology: Topology) -> bool:
    """Whether the ranks' environment travels in a private file; otherwise it is inherited, or Slurm hands it on."""
    return not topology.is_local and launcher != "slurm"


def make_ready(plan: Plan, topology: Topology, hosts: Hosts, launch: str) -> Readiness:
    """Guard the launch on every host, and find out where the ranks can meet and what they have to be told.

    Raises DsllmError where a host cannot be asked, is not ready, or cannot be reached by the others.
    """
    lost = [answer for answer in hosts.ask_all("guard", launch=launch).values() if isinstance(answer, HostError)]
    if lost:
        raise DsllmError(
            f"{_listed([str(error) for error in lost])}; mend it, or leave the host out with --exclude; "
            "dsllm doctor says more"
        )
    if topology.is_local:
        port = hosts.agents[THIS_MACHINE].ask("free_port", preferred=plan.port)
        return _ready(plan, topology, Meeting("127.0.0.1", port), {}, launch)
    if _asks_nobody(plan):
        return _ready(plan, topology, Meeting(topology.names[0], rendezvous_port(os.environ)), {}, launch)
    report = _examined(plan, topology, hosts)
    assert report.rendezvous is not None
    meeting = Meeting(report.rendezvous.address, report.rendezvous.port)
    return _ready(plan, replace(topology, on_cpu=report.on_cpu), meeting, report.rendezvous.interfaces, launch)


def _asks_nobody(plan: Plan) -> bool:
    return plan.launcher == "slurm" and not plan.asks_doctor


def _examined(plan: Plan, topology: Topology, hosts: Hosts) -> Report:
    """What the doctor's quick part finds; where it is not asked, only whether the ranks can meet counts."""
    report = examine(hosts, wanted_of(plan, topology), quick=True)
    counts = [
        finding
        for findings in report.failed.values()
        for finding in findings
        if plan.asks_doctor or finding.check in ("reach", "port")
    ]
    if counts or report.rendezvous is None:
        found = _listed([f"{finding.host}: {finding.found}; {finding.remedy}" for finding in counts])
        raise DsllmError(f"{found}; dsllm doctor says more, --no-doctor starts all the same where that is possible")
    return report


def wanted_of(plan: Plan, topology: Topology) -> Wanted:
    """What the doctor is to look at."""
    return Wanted(
        hosts=topology.hosts,
        spec=plan.spec,
        spec_file=Path(plan.spec_name) if Path(plan.spec_name).is_file() else None,
        run_dir=plan.run_dir,
        on_cpu=topology.on_cpu,
        port=plan.port,
    )


def _ready(plan: Plan, topology: Topology, meeting: Meeting, interfaces: Mapping[str, str], launch: str) -> Readiness:
    """Everything that the ranks of each host have to be told."""
    common = {} if topology.is_local else forwarded(plan.spec)
    common |= {"DSLLM_LAUNCH": launch, "DSLLM_WORLD_SIZE": str(topology.world_size)}
    if topology.on_cpu:
        common["DS_ACCELERATOR"] = "cpu"
    if plan.launcher not in SETS_MEETING:
        common |= {"MASTER_ADDR": meeting.address, "MASTER_PORT": str(meeting.port)}
    told = {host.name: {**common, **_of_host(plan, host, interfaces)} for host in topology.hosts}
    return Readiness(topology, meeting, told)


def _of_host(plan: Plan, host: Host, interfaces: Mapping[str, str]) -> dict[str, str]:
    """What depends on the host: the interface that leads to the others, and GPUs where only some are chosen."""
    told = {}
    if host.name in interfaces:
        named = interface_variables(interfaces[host.name])
        told = {name: value for name, value in named.items() if name not in os.environ}
    if host.chosen is not None and plan.launcher not in ("local", "pdsh", "ssh"):
        told["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, host.slot_ids))
    return told


def forwarded(spec: Spec) -> dict[str, str]:
    """This process's variables that go along to every host, and those that DeepSpeed would read from its own file."""
    own = environment.selected(os.environ, spec.launch.environment)
    return {**environment.read_deepspeed_env(Path.cwd(), Path.home(), os.environ), **own}


def _hand_out(hosts: Hosts, launch: str, variables: Mapping[str, Mapping[str, str]]) -> str:
    """Write each host's variables into its private file. Returns the file's path, the same on every host."""
    each = {name: {"text": environment.as_text(told)} for name, told in variables.items()}
    answers = list(hosts.ask_all("write_private", each=each, launch=launch).values())
    failed = [str(answer) for answer in answers if isinstance(answer, HostError)]
    if failed:
        raise DsllmError(f"{_listed(failed)}; the private environment is written below /tmp: make room there")
    return str(answers[0])


def _with_variables(start: Start, variables: Mapping[str, Mapping[str, str]]) -> Start:
    """Told in the environment of the command, which ranks inherit: what is the same for every host."""
    first, *others = variables.values()
    common = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    return replace(start, environment={**common, **start.environment})


def _stopped_by(history: Path, events_before: int) -> str | None:
    """What a run that ended before its last step says it was stopped by."""
    new = read_history(history)[events_before:]
    return next((event["by"] for event in reversed(new) if event["event"] == "stopped"), None)


def _last_lines(plan: Plan, hosts: Hosts, ending: Ending) -> tuple[str, ...]:
    """The end of the log of the rank that failed first: rank 0's is on screen already."""
    if ending.is_good or not ending.rank:
        return ()
    path = str(plan.logs / f"rank{ending.rank}.log")
    answers = hosts.ask_all("tail", path=path, lines=LAST_LINES).values()
    return next((tuple(answer) for answer in answers if answer and not isinstance(answer, HostError)), ())


def _listed(problems: Sequence[str]) -> str:
    """In one line, of many only the first."""
    more = f" and {len(problems) - LISTED_HOSTS} more" if len(problems) > LISTED_HOSTS else ""
    return "; ".join(problems[:LISTED_HOSTS]) + more
