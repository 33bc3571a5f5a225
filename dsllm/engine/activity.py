"""Where this rank is in the run: the loop notes it, the watchdog's thread reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")

LONG_PHASES = frozenset({"starting", "preparing tokens", "saving", "ending"})
"""Work of one piece, without a tick in it."""
LONG_SECONDS = 1800.0
"""What such work may take at least, and the first step, in which kernels and blocks are compiled."""


class Activity:
    """A tick is something that this rank has come to: a micro-batch read, its forward, its backward, the optimizer's
    step, a micro-batch evaluated, a save, the next step.

    Only the main thread writes, and each attribute by itself: no lock, nothing to wait for.
    """

    def __init__(self) -> None:
        self.ticks = 0
        self.phase = "starting"
        self.step = 0
        """The step that runs, counted from 1; 0 before the first."""
        self._steps_begun = 0

    def __call__(self, phase: str) -> None:
        """This rank has come to `phase`."""
        self.phase = phase
        self.ticks += 1

    def begin_step(self, step: int) -> None:
        """The loop has come to a step, counted from 1."""
        self.step = step
        self._steps_begun += 1
        self("reading")

    def allowed_seconds(self, hang_seconds: float) -> float:
        """How long nothing needs to tick: `hang_seconds`, or longer where that is no sign of a hang."""
        is_long = self.phase in LONG_PHASES or self._steps_begun <= 1
        return max(hang_seconds, LONG_SECONDS) if is_long else hang_seconds

    def counting(self, sets: Mapping[str, Callable[[], Iterable[T]]]) -> dict[str, Callable[[], Iterator[T]]]:
        """The same validation sets, whose micro-batches tick."""

        return {label: lambda open_set=open_set: self.ticking(open_set()) for label, open_set in sets.items()}

    def ticking(self, questions: Iterable[T]) -> Iterator[T]:
        """The same pieces of an evaluation, which tick."""
        for question in questions:
            self("evaluation")
            yield question
