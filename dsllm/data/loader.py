"""What the engine reads: micro-batches of the global order, each rank its slice."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dsllm.data.batches import batch_of, samples_of, share_of
from dsllm.data.mixture import Drawn
from dsllm.data.run_samples import RunSamples
from dsllm.data.samples import IGNORED_LABEL, Rows, Samples

MicroBatch = dict[str, torch.Tensor]
"""What a forward takes, by its name there.

`input_ids` and `labels`: int64, (micro_batch_size, sequence_length); `labels[:, t]` follows `input_ids[:, t]`, and a
label of -100 never counts. `position_ids`: likewise, where attention stops between documents; they restart at 0 at the
beginning of each. `loss_tokens`: a scalar, in training on samples with padding: what the sum of the tokens' losses is
divided by, so that its mean over all micro-batches and ranks is the mean over the counted tokens of the global batch.
"""

_PREFETCHED = 2


def training_micro_batches(
    samples: RunSamples,
    *,
    start_step: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    skipped_batches: Collection[int] = (),
    pin: bool = False,
) -> Generator[MicroBatch, None, None]:
    """This rank's micro-batches from step `start_step` on, without end, read ahead on another thread.

    Rank `r` reads the `r`-th of `world_size` equal slices of every step; which batch of the order a step takes is told
    by batches.py. With `pin` they lie in page-locked memory, which a GPU reads by itself. Closing the iterator ends the
    thread.
    """
    assert global_batch_size % (micro_batch_size * world_size) == 0, "the batch was not solved for this world size"
    own = share_of(range(global_batch_size), rank, world_size)

    def read() -> Iterator[MicroBatch]:
        for step in itertools.count(start_step):
            drawn = samples.draw(np.array(samples_of(batch_of(step, skipped_batches), global_batch_size)))
            shared = _loss_tokens(samples, drawn, micro_batch_size)
            for first in own[::micro_batch_size]:
                yield {**_micro_batch(samples.read(drawn[first : first + micro_batch_size])), **shared}

    return _prefetched(read(), pin)


def validation_micro_batches(
    samples: Samples, *, max_sequences: int, micro_batch_size: int, rank: int, world_size: int, pin: bool = False
) -> Iterator[MicroBatch]:
    """The first `max_sequences` samples (all, where there are fewer), dealt to the ranks one by one.

    Every rank gets as many micro-batches of the same shape, because under ZeRO-3 all must take part in each forward;
    rows that are left over have labels of -100 throughout. Read ahead and pinned as in training.
    """
    num_samples = min(max_sequences, len(samples))
    own = np.arange(rank, num_samples, world_size)
    rows_per_rank = -(-num_samples // world_size)
    firsts = range(0, rows_per_rank, micro_batch_size)
    return _prefetched((_padded(samples, own[first:][:micro_batch_size], micro_batch_size) for first in firsts), pin)


def _micro_batch(rows: Rows) -> MicroBatch:
    batch = {"input_ids": torch.from_numpy(rows.inputs), "labels": torch.from_numpy(rows.labels)}
    if rows.positions is not None:
        batch["position_ids"] = torch.from_numpy(rows.positions)
    return batch


def _loss_tokens(samples: RunSamples, global_batch: Drawn, micro_batch_size: int) -> MicroBatch:
    """The counted labels of the global batch over the number of its micro-batches, on all ranks; nothing where every
    micro-batch has the same number of them."""
    if not samples.pads:
        return {}
    return {"loss_tokens": torch.tensor(samples.num_labels(global_batch) / (len(global_batch) // micro_batch_size))}


def _padded(samples: Samples, ids: np.ndarray, micro_batch_size: int) -> MicroBatch:
    """A micro-batch of the samples, filled up with rows of sample 0 that count for nothing."""
    padding = np.zeros(micro_batch_size - len(ids), dtype=np.int64)
    batch = _micro_batch(samples.read(np.concatenate([ids, padding])))
    batch["labels"][len(ids) :] = IGNORED_LABEL
    return batch


def _prefetched(batches: Iterator[MicroBatch], pin: bool) -> Generator[MicroBatch, None, None]:
    """The same batches, made and pinned on a thread ahead of their use; what making them raises surfaces in its turn.

    That one thread alone touches `batches`.
    """

    def make_next() -> MicroBatch | None:
        batch = next(batches, None)
        if batch is None or not pin:
            return batch
        return {name: tensor.pin_memory() for name, tensor in batch.items()}

    thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        pending = deque(thread.submit(make_next) for _ in range(_PREFETCHED))
        while (batch := pending.popleft().result()) is not None:
            pending.append(thread.submit(make_next))
            yield batch
    finally:
        thread.shutdown(wait=True, cancel_futures=True)
