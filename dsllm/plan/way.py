"""A run, and the ranks that it is to run on."""

from __future__ import annotations

from dataclasses import dataclass

from dsllm.plan.workload import Workload


@dataclass(frozen=True)
class Way:
    """A run on a number of ranks."""

    run: Workload
    world_size: int
    micro_batch_size: int
    has_batch: bool = True
    """Whether the global batch is given, so that micro-batch and ranks must divide it; else it grows with the ranks."""
