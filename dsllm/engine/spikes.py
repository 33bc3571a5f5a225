"""A loss that jumps: how far it lies from what the last steps made usual."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

DEVIATIONS_PER_MAD = 1.4826
"""Standard deviations in a median absolute deviation, for a normal distribution (Rousseeuw and Croux, 1993)."""
LEAST_SPREAD = 0.005
"""Share of the median that counts as the spread at least: a loss that lies flat, as that of a few repeated batches,
would else jump at every breath. At a loss of 3 and a threshold of 8, what is less than 0.12 nats is no spike."""


@dataclass(frozen=True)
class Spike:
    """A loss far above the usual, in nats, and how far in robust standard deviations."""

    loss: float
    median: float
    score: float


class SpikeDetector:
    """Holds each loss against the last `window`, once half as many are known.

    The score is the distance from their median in units of their spread, both robust: a few odd losses within the
    window move neither. Only upward counts; a loss may fall as far as it likes.
    """

    def __init__(self, window: int, threshold: float, losses: Iterable[float] = ()) -> None:
        """`losses` are those of the steps before, oldest first."""
        self._losses: deque[float] = deque(maxlen=window)
        self._least = window // 2
        self._threshold = threshold
        for loss in losses:
            self.observe(loss)

    def observe(self, loss: float) -> Spike | None:
        """The spike that this finite loss is; None for a usual one. Either counts among the last from then on: a level
        that lasts becomes the usual one."""
        spike = self._judge(loss)
        self._losses.append(loss)
        return spike

    def _judge(self, loss: float) -> Spike | None:
        if len(self._losses) >= self._least:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(other - median) for other in self._losses)
            spread = max(DEVIATIONS_PER_MAD * deviation, LEAST_SPREAD * abs(median))
            if loss - median > self._threshold * spread:
                return Spike(loss, median, (loss - median) / spread if spread else float("inf"))
        return None
