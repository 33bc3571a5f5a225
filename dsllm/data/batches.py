"""Which samples of the global order a step takes, and which of them a rank.

The order is cut into batches of `global_batch_size` samples. Step `s` takes the `s`-th batch of those that the run does
not skip: a run that was rolled back leaves out the batch behind a loss spike, for good, and all later steps move up.
"""

from __future__ import annotations

from collections.abc import Collection


def batch_of(step: int, skipped_batches: Collection[int] = ()) -> int:
    """The batch that step `step`, counted from 0, takes: the `step`-th, from 0, that is not skipped."""
    batch = step
    for skipped in sorted(set(skipped_batches)):
        if skipped > batch:
            break
        batch += 1
    return batch


def samples_of(batch: int, global_batch_size: int) -> range:
    """The samples of the run that a batch is made of."""
    return range(batch * global_batch_size, (batch + 1) * global_batch_size)


def share_of(samples: range, rank: int, world_size: int) -> range:
    """What `rank` reads of a batch: its `rank`-th of `world_size` equal slices."""
    size = len(samples) // world_size
    return samples[rank * size : (rank + 1) * size]
