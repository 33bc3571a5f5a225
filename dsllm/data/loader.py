"""What the engine reads: micro-batches of the global order, each rank its slice."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dsllm.data.order import sample_ids
from dsllm.data.shards import Split, TokenShards
from dsllm.errors import DataError

MicroBatch = dict[str, torch.Tensor]
"""`input_ids` and `labels`, int64, (micro_batch_size, sequence_length); `labels[:, t]` follows `input_ids[:, t]`."""

IGNORED_LABEL = -100
"""The label of positions that no loss counts, as torch's cross-entropy has it."""

_PREFETCHED = 2
_Argument = TypeVar("_Argument")


class TokenSamples:
    """The split's token stream cut into samples: `samples[i]` is `sequence_length + 1` ids from token
    `i * sequence_length` on, so that every token but the first is predicted exactly once an epoch."""

    def __init__(self, shards: TokenShards, sequence_length: int) -> None:
        """DataError where the split is too short for one sample."""
        self.shards = shards
        self.sequence_length = sequence_length
        if len(self) < 1:
            raise DataError(
                f"{shards.directory}: the {shards.split} split holds {len(shards)} tokens, and one sample needs "
                f"{sequence_length + 1}; give more text, shorten batch.sequence_length"
                + (", or raise data.validation_fraction" if shards.split == "validation" else "")
            )

    @classmethod
    def open(cls, directory: Path | str, split: Split, sequence_length: int) -> TokenSamples:
        """The samples of a prepared folder's split."""
        return cls(TokenShards.open(directory, split), sequence_length)

    def __len__(self) -> int:
        return (len(self.shards) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """Sample `index` in `range(len(self))`: `sequence_length + 1` ids."""
        return self.shards.read(index * self.sequence_length, self.sequence_length + 1).astype(np.int64)


def step_sample_ids(seed: int, num_samples: int, step: int, global_batch_size: int) -> npt.NDArray[np.int64]:
    """The samples of step `step`, in the order of the run; (global_batch_size,), whatever the world size."""
    first = step * global_batch_size
    return sample_ids(seed, num_samples, np.arange(first, first + global_batch_size))


def training_micro_batches(
    samples: TokenSamples,
    *,
    seed: int,
    start_step: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches from step `start_step` on, without end, read ahead on another thread.

    Rank `r` reads the `r`-th of `world_size` equal slices of every step. Closing the iterator ends the thread.
    """
    assert global_batch_size % (micro_batch_size * world_size) == 0, "the batch was not solved for this world size"
    rows = global_batch_size // world_size

    def own_ids() -> Iterator[npt.NDArray[np.int64]]:
        for step in itertools.count(start_step):
            ids = step_sample_ids(seed, len(samples), step, global_batch_size)[rank * rows : (rank + 1) * rows]
            yield from ids.reshape(-1, micro_batch_size)

    return _prefetched(functools.partial(_micro_batch, samples), own_ids())


def validation_micro_batches(
    samples: TokenSamples, *, max_sequences: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """The first `max_sequences` samples (all, where there are fewer), dealt to the ranks one by one.

    Every rank gets as many micro-batches of the same shape, because under ZeRO-3 all must take part in each forward;
    rows that are left over have labels of -100 throughout.
    """
    num_samples = min(max_sequences, len(samples))
    own = np.arange(rank, num_samples, world_size)
    rows_per_rank = -(-num_samples // world_size)
    for first in range(0, rows_per_rank, micro_batch_size):
        yield _padded(samples, own[first : first + micro_batch_size], micro_batch_size)


def _micro_batch(samples: TokenSamples, ids: npt.NDArray[np.int64]) -> MicroBatch:
    tokens = torch.from_numpy(np.stack([samples[index] for index in ids.tolist()]))
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def _padded(samples: TokenSamples, ids: npt.NDArray[np.int64], micro_batch_size: int) -> MicroBatch:
    """A micro-batch of the samples, filled up with rows of sample 0 that count for nothing."""
    padding = np.zeros(micro_batch_size - len(ids), dtype=np.int64)
    batch = _micro_batch(samples, np.concatenate([ids, padding]))
    batch["labels"][len(ids) :] = IGNORED_LABEL
    return batch


def _prefetched(read: Callable[[_Argument], MicroBatch], arguments: Iterator[_Argument]) -> Iterator[MicroBatch]:
    """`map(read, arguments)`, the next results being read on a thread; what `read` raises surfaces in its turn."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        pending = deque(thread.submit(read, argument) for argument in itertools.islice(arguments, _PREFETCHED))
        while pending:
            batch = pending.popleft().result()
            pending.extend(thread.submit(read, argument) for argument in itertools.islice(arguments, 1))
            yield batch
    finally:
        thread.shutdown(wait=True, cancel_futures=True)
