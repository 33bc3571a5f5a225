"""The true peak of forward, backward and step, to set beside what was predicted."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field

from dsllm.engine.allocators import Allocator
from dsllm.plan.memory import PHASES, Phase


@dataclass
class MeasuredMemory:
    """Bytes of tensors on this rank, more than there were before the engine; the largest over all steps."""

    peak_bytes: dict[Phase, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    """At any moment of the phase."""
    kept_bytes: int = 0
    """Before a forward: what stays from one micro-batch to the next."""
    reserved_bytes: int | None = None
    """What the allocator took from the device for it, gaps included; None where it does not tell."""

    @property
    def largest_bytes(self) -> int:
        """The peak of all phases."""
        return max(self.peak_bytes.values())


class MemoryMeter:
    """Notes what each phase takes. Make it before the engine, since what is held by then does not count."""

    def __init__(self, allocator: Allocator | None) -> None:
        """Without an allocator there is nothing to measure, and `measured` stays None."""
        self._allocator = allocator
        # Engines hold themselves in cycles, and BF16_Optimizer lets go of more only when it is gone: one from before
        # must not die while this one is measured.
        gc.collect()
        gc.collect()
        self._before = allocator.read().held_bytes if allocator else 0
        self.during: Phase | None = None
        """The phase that has begun and not ended, as where a fault has just come out of it."""
        self.measured = MeasuredMemory() if allocator else None

    @property
    def held_bytes(self) -> int:
        """What was held at most since the last phase began; 0 where that is not known."""
        return self._allocator.read().peak_bytes - self._before if self._allocator else 0

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Within, what is allocated belongs to that phase."""
        self.during = phase
        if self._allocator is None or self.measured is None:
            yield
            self.during = None
            return
        measured = self.measured
        if phase == "forward":
            measured.kept_bytes = max(measured.kept_bytes, self._allocator.read().held_bytes - self._before)
        self._allocator.reset_peak()
        yield
        self.during = None
        then = self._allocator.read()
        measured.peak_bytes[phase] = max(measured.peak_bytes[phase], then.peak_bytes - self._before)
        if then.reserved_bytes is not None:
            measured.reserved_bytes = max(measured.reserved_bytes or 0, then.reserved_bytes)
