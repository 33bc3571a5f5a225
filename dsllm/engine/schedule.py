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
        return peak * (step + 1) / schedule.warmup_steps
    progress = (step + 1 - schedule.warmup_steps) / max(1, train_steps - schedule.warmup_steps)
    floor = schedule.min_learning_rate_ratio
    return peak * (floor + (1.0 - floor) * _SHAPES[schedule.name](min(1.0, progress), schedule))


def _cosine(progress: float, schedule: Schedule) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(progress: float, schedule: Schedule) -> float:
    return 1.0 - progress


def _stable_then_decay(progress: float, schedule: Schedule) -> float:
    """Warm-up, stable, decay: linear over the last `decay_fraction` (MiniCPM, arXiv:2404.06395)."""
    return min(1.0, (1.0 - progress) / schedule.decay_fraction)


def _constant(progress: float, schedule: Schedule) -> float:
    return 1.0


_SHAPES: dict[str, Callable[[float, Schedule], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _stable_then_decay,
    "constant": _constant,
}
