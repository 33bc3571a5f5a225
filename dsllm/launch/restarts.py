"""Carries a run through: starts it, and starts it again where that can help, on the hosts that are left."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsllm.errors import DsllmError, UserError
from dsllm.launch.agent import SILENT_SECONDS
from dsllm.launch.attempt import Outcome, attempt
from dsllm.launch.ending import Ending
from dsllm.launch.history import History
from dsllm.launch.requests import Requests
from dsllm.launch.run_plan import RunPlan
from dsllm.launch.steps import steps_done
from dsllm.launch.supervisor import Screen
from dsllm.launch.topology import Topology
from dsllm.units import format_duration

FIRST_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 300.0


@dataclass(frozen=True)
class Patience:
    """How often a run is started again, and with how little."""

    max_restarts: int = 0
    min_hosts: int | None = None
    """All hosts when absent."""


def carry_through(
    plan: RunPlan,
    topology: Topology,
    resume: str,
    stop_after_seconds: float | None,
    patience: Patience,
    say: Callable[[str], None],
    screen: Screen | None = None,
) -> Ending:
    """Run to the end of the last attempt; `say` is told, a line at a time, what comes between them.

    Every attempt keeps the spec, and with it the global batch, and goes on from the last sound checkpoint. What ends
    the run twice at the same step in the same way is not tried a third time, nor what somebody has asked to end.

    Raises what `attempt` raises at the first start; later a host that is not ready is one more failed attempt.
    """
    started, checkpoint_before = time.monotonic(), _latest(plan.run_dir)
    earlier: tuple[Ending, int] | None = None
    start = functools.partial(attempt, plan, topology, announce=say, min_hosts=patience.min_hosts, screen=screen)
    with Requests() as requests:
        for number in range(patience.max_restarts + 1):
            left = _time_left(stop_after_seconds, started)
            try:
                outcome = start(resume, requests, stop_after=left)
            except DsllmError as error:
                if number == 0 or isinstance(error, UserError):
                    raise
                outcome = Outcome(Ending("lost_host", str(error), was_ready=False))
            ending, step = outcome.ending, steps_done(plan.run_dir)
            _note_end(plan, ending, step)
            tell(plan, outcome, say)
            if not _is_worth_another(ending, step, earlier) or number == patience.max_restarts:
                break
            earlier = (ending, step)
            if _latest(plan.run_dir) != checkpoint_before or resume == "never":
                resume = "auto"  # a path was for the first start; from its own first checkpoint on the run goes on
            wait_seconds = min(FIRST_WAIT_SECONDS * 2**number, LONGEST_WAIT_SECONDS)
            say(
                f"ended by {ending.cause}: {ending.message}; starting again in {format_duration(wait_seconds)}, "
                f"restart {number + 1} of {patience.max_restarts}"
            )
            requests.wait(wait_seconds)
            if requests.stop_asked_by is not None:
                return Ending("interrupted", f"{requests.stop_asked_by} came before it started again")
    return ending


def tell(plan: RunPlan, outcome: Outcome, say: Callable[[str], None]) -> None:
    """What an attempt leaves to be said of it."""
    ending = outcome.ending
    if outcome.last_lines:
        say(f"rank {ending.rank} on {ending.host} failed first; the end of {plan.logs}/rank{ending.rank}.log:")
        for line in outcome.last_lines:
            say(f"  {line}")
    for host, number in outcome.left_behind.items():
        say(f"{host}: {number} processes of the run were left, and ended")
    for host in outcome.not_swept:
        say(f"{host}: cannot be looked at; what runs there ends by itself within {SILENT_SECONDS:g} s")


def _is_worth_another(ending: Ending, step: int, earlier: tuple[Ending, int] | None) -> bool:
    """Whether starting again can help: not where it ended in the same way before, without a step between. Hosts that
    are not ready may be so at the next look."""
    if not ending.is_curable:
        return False
    if not ending.was_ready or earlier is None:
        return True
    before, step_before = earlier  # messages may hold figures that differ
    return (ending.cause, ending.rank, ending.host, step) != (before.cause, before.rank, before.host, step_before)


def _note_end(plan: RunPlan, ending: Ending, step: int) -> None:
    if plan.only_checks:
        return
    History(plan.history, writes=True).append(
        "ended", step, cause=ending.cause, message=ending.message, rank=ending.rank, host=ending.host
    )


def _latest(run_dir: Path) -> str | None:
    """The run's newest complete checkpoint, which is named last."""
    try:
        return (run_dir / "checkpoints" / "latest").read_text()
    except OSError:
        return None


def _time_left(stop_after_seconds: float | None, started: float) -> str | None:
    """For the option of train.py: the limit counts from the first start."""
    if stop_after_seconds is None:
        return None
    return f"{max(1, round(stop_after_seconds - (time.monotonic() - started)))}s"
