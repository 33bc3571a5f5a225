"""Carries a run through: starts it, and starts it again where that can help, on the hosts that are left."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dsllm.errors import DsllmError, UserError
from dsllm.launch.agent import SILENT_SECONDS
from dsllm.launch.attempt import Outcome, Plan, attempt, open_hosts, wanted_of
from dsllm.launch.doctor.doctor import examine
from dsllm.launch.ending import Ending
from dsllm.launch.history import History
from dsllm.launch.supervisor import Screen
from dsllm.launch.topology import Topology
from dsllm.plan.batch import check_batch
from dsllm.units import format_duration

FIRST_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 300.0


@dataclass(frozen=True)
class Patience:
    """How often a run is started again, and with how little."""

    max_restarts: int = 0
    min_hosts: int | None = None
    """As many hosts as at the first start when absent."""


def carry_through(
    plan: Plan,
    topology: Topology,
    resume: str,
    stop_after_seconds: float | None,
    patience: Patience,
    say: Callable[[str], None],
    screen: Screen | None = None,
) -> Ending:
    """Run to the end of the last attempt; `say` is told, a line at a time, what comes between them.

    Every attempt keeps the spec, and with it the global batch, on as many hosts as are left, and goes on from the last
    sound checkpoint. What ends the run twice at the same step in the same way is not tried a third time.

    Raises what `attempt` raises at the first start; later that is one more failed attempt.
    """
    history = History(plan.history, writes=True)
    started, earlier = time.monotonic(), None
    for number in range(patience.max_restarts + 1):
        step = steps_done(plan.run_dir)
        try:
            used = _hosts_left(plan, topology, patience) if number or patience.min_hosts else topology
            history.append("launched", step, launcher=plan.launcher, hosts=used.names, world_size=used.world_size)
            outcome = attempt(plan, used, resume, _time_left(stop_after_seconds, started), announce=say, screen=screen)
        except DsllmError as error:
            if number == 0:
                raise
            outcome = Outcome(Ending("lost_host", str(error)))
        ending, done = outcome.ending, steps_done(plan.run_dir)
        history.append("ended", done, cause=ending.cause, message=ending.message, rank=ending.rank, host=ending.host)
        _tell(plan, outcome, say)
        came_again = ending == earlier and done <= step
        if ending.is_good or not ending.is_curable or came_again or number == patience.max_restarts:
            return ending
        earlier, resume = ending, _resume_again(plan, resume)
        wait_seconds = min(FIRST_WAIT_SECONDS * 2**number, LONGEST_WAIT_SECONDS)
        say(
            f"ended by {ending.cause}: {ending.message}; starting again in {format_duration(wait_seconds)}, "
            f"restart {number + 1} of {patience.max_restarts}"
        )
        time.sleep(wait_seconds)
    raise AssertionError("the last attempt returns")


def steps_done(run_dir: Path) -> int:
    """Steps that a run has recorded; 0 before the first."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines()[-2:]
    except OSError:
        return 0
    steps = [0]
    for line in lines:  # of a killed run the last one may be torn
        with contextlib.suppress(ValueError, KeyError, TypeError):
            steps.append(json.loads(line)["step"])
    return steps[-1]


def _hosts_left(plan: Plan, topology: Topology, patience: Patience) -> Topology:
    """The hosts that nothing speaks against, as many as the global batch divides over.

    Raises DsllmError where they are fewer than the run may start with.
    """
    if topology.is_local:
        return topology
    wanted = wanted_of(plan, topology)
    with open_hosts(plan, topology) as hosts:
        report = examine(hosts, wanted, quick=True)
    healthy = [host for host in topology.hosts if host.name in report.healthy]
    fewest = patience.min_hosts or topology.num_hosts
    for number in range(len(healthy), fewest - 1, -1):
        with contextlib.suppress(UserError):
            check_batch(plan.spec.batch, number * topology.ranks_per_host)
            return replace(topology, hosts=tuple(healthy[:number]))
    bad = "; ".join(f"{name}: {findings[0].found}" for name, findings in report.failed.items())
    raise DsllmError(
        f"{len(healthy)} of {topology.num_hosts} hosts are ready, and the run may start with {fewest} whose ranks "
        f"divide the global batch ({bad or 'no such number'}); mend them, or lower --min-hosts"
    )


def _resume_again(plan: Plan, resume: str) -> str:
    """From the run's own checkpoints as soon as it has one: `never`, or another run's, was for the first start."""
    has_own = (plan.run_dir / "checkpoints" / "latest").exists()  # written last, once a checkpoint is complete
    return "auto" if has_own or resume == "never" else resume


def _time_left(stop_after_seconds: float | None, started: float) -> str | None:
    """For the option of train.py: the limit counts from the first start."""
    if stop_after_seconds is None:
        return None
    return f"{max(1, round(stop_after_seconds - (time.monotonic() - started)))}s"


def _tell(plan: Plan, outcome: Outcome, say: Callable[[str], None]) -> None:
    ending = outcome.ending
    if outcome.last_lines:
        say(f"rank {ending.rank} on {ending.host} failed first; the end of {plan.logs}/rank{ending.rank}.log:")
        for line in outcome.last_lines:
            say(f"  {line}")
    for host in outcome.not_swept:
        say(f"{host}: cannot be looked at; what runs there ends by itself within {SILENT_SECONDS:g} s")
