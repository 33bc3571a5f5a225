"""One start of a run's ranks: hosts are made ready, ranks started, watched to the end and swept."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dsllm.launch.ending import Ending, find_ending
from dsllm.launch.history import History, read_history
from dsllm.launch.hosts import HostError, Hosts
from dsllm.launch.launchers import Start, starts, train_arguments
from dsllm.launch.readiness import hand_out, make_ready, needs_file, open_hosts
from dsllm.launch.requests import Requests
from dsllm.launch.run_plan import RunPlan
from dsllm.launch.steps import steps_done
from dsllm.launch.supervisor import Screen, watch_ranks
from dsllm.launch.topology import Topology

LAST_LINES = 20
CHECKED = Ending("finished", "the checks are made")


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, and what is left to say of it."""

    ending: Ending
    last_lines: tuple[str, ...] = ()
    """Of the log of the rank that failed first, where that is known and not on screen already."""
    left_behind: Mapping[str, int] = field(default_factory=dict)
    """Processes that had to be ended by force after the ranks' own end, by host."""
    not_swept: tuple[str, ...] = ()
    """Hosts that could not be looked at; their agents end what is left there."""


def attempt(
    plan: RunPlan,
    topology: Topology,
    resume: str,
    requests: Requests,
    *,
    announce: Callable[[str], None],
    stop_after: str | None = None,
    min_hosts: int | None = None,
    screen: Screen | None = None,
) -> Outcome:
    """Start the ranks and wait for their end; `announce` is told which hosts are left out and why, and the
    commands that start them.

    Of the hosts that are not ready, all but `min_hosts` may be left out; none when it is None.

    Raises DsllmError where others are not ready, UserError where the launcher is not installed.
    """
    launch = secrets.token_hex(8)
    events_before = len(read_history(plan.history))
    with open_hosts(plan, topology) as hosts:
        ready = make_ready(plan, topology, hosts, launch, min_hosts)
        used = ready.topology
        file = hand_out(hosts, launch, ready.variables) if needs_file(plan.launcher, used) else None
        arguments = train_arguments(
            plan.spec_name, plan.given_run_dir, resume, plan.overrides, stop_after, environment_file=file
        )
        if plan.only_checks:
            arguments.append("--check")
        planned = starts(plan.launcher, used, ready.meeting, arguments, Path.cwd())
        for line in ready.left_out:
            announce(line)
        for start in planned:
            announce(start.as_typed())
        _note_launch(plan, used)
        if file is None:
            planned = [_with_variables(start, ready.variables) for start in planned]
        watched = watch_ranks(planned, hosts, launch, str(plan.logs), requests, screen)
        ending = find_ending(replace(watched.signs, says=_says(plan, events_before)))
        return Outcome(
            ending,
            _last_lines(plan, hosts, ending),
            {host: len(commands) for host, commands in watched.left_behind.items()} if ending.is_good else {},
            tuple(error.host for error in watched.not_swept),
        )


def _note_launch(plan: RunPlan, topology: Topology) -> None:
    if not plan.only_checks:
        History(plan.history, writes=True).append(
            "launched",
            steps_done(plan.run_dir),
            launcher=plan.launcher,
            hosts=topology.names,
            world_size=topology.world_size,
        )


def _with_variables(start: Start, variables: Mapping[str, Mapping[str, str]]) -> Start:
    """Told in the environment of the command, which ranks inherit: what is the same for every host."""
    first, *others = variables.values()
    common = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    return replace(start, environment={**common, **start.environment})


def _says(plan: RunPlan, events_before: int) -> Ending | None:
    """What the run itself has written of its end."""
    if plan.only_checks:
        return CHECKED
    for event in reversed(read_history(plan.history)[events_before:]):
        if event["event"] == "finished":
            return Ending("finished", "all steps are done")
        if event["event"] == "stopped":
            return Ending("stopped", f"by {event['by']}")
    return None


def _last_lines(plan: RunPlan, hosts: Hosts, ending: Ending) -> tuple[str, ...]:
    """The end of the log of the rank that failed first: rank 0's is on screen already."""
    if ending.is_good or not ending.rank:
        return ()
    path = str(plan.logs / f"rank{ending.rank}.log")
    answers = hosts.ask_all("tail", path=path, lines=LAST_LINES).values()
    return next((tuple(answer) for answer in answers if answer and not isinstance(answer, HostError)), ())
