"""Learning rate schedules: pure functions of the step, so that a resume has nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable

from dsllm.spec.sections import Schedule


def learning_rate(step: int, schedule: Schedule, peak: float, train_steps: int) -> float:
    """Learning rate of `step`, counted from 0, in a run of `train_steps`.

    Warm-up is linear and reaches the peak on its last step; the run's last step has the smallest rate.
    """
    if step < schedule.warmup_steps:
        return peak * ((step + 1) / schedule.warmup_steps)
    left = max(0, train_steps - step - 1)
    floor = schedule.min_learning_rate_ratio
    return peak * (floor + (1.0 - floor) * _SHAPES[schedule.name](left, schedule, train_steps))


def _cosine(left: int, schedule: Schedule, train_steps: int) -> float:
    return 0.5 * (1.0 - math.cos(math.pi * _linear(left, schedule, train_steps)))


def _linear(left: int, schedule: Schedule, train_steps: int) -> float:
    return left / max(1, train_steps - schedule.warmup_steps)


def _stable_then_decay(left: int, schedule: Schedule, train_steps: int) -> float:
    """Warm-up, stable, decay: linear over the last `decay_fraction` of the run (MiniCPM, arXiv:2404.06395)."""
    return min(1.0, left / (schedule.decay_fraction * train_steps))


def _constant(left: int, schedule: Schedule, train_steps: int) -> float:
    return 1.0


_SHAPES: dict[str, Callable[[int, Schedule, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _stable_then_decay,
    "constant": _constant,
}
"""Share of the way between floor and peak, of the steps that are left after this one."""
