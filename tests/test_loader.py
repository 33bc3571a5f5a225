"""The loader: the same step on any number of ranks, every sample once an epoch, nothing hidden by a thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small_shards import numbered_documents, write_folder

from dsllm.data.loader import MicroBatch, training_micro_batches, validation_micro_batches
from dsllm.data.mixture import MixedSource, Mixture
from dsllm.data.order import Integers
from dsllm.data.run_samples import RunSamples, open_run_samples, open_validation_samples
from dsllm.data.samples import IGNORED_LABEL, Rows, Samples
from dsllm.errors import DataError
from dsllm.spec.sections import Data, TextSource

SEQUENCE_LENGTH = 32
GLOBAL_BATCH_SIZE = 24
SEED = 1337
LENGTHS = {"news": [20, 75, 31, 150] * 12, "books": [11, 300, 64] * 4}
MIXES = {
    "one pool": {},
    "a weighted mix": {"weights": (0.7, 0.3)},
    "best fit": {"packing": "best_fit", "mask_documents": True},
    "a weighted mix, best fit": {"weights": (0.7, 0.3), "packing": "best_fit"},
}

Row = tuple[int, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources with documents in which no token but end-of-text occurs twice."""
    path = tmp_path_factory.mktemp("loader")
    write_folder(
        path,
        {
            "news": {
                "train": numbered_documents(LENGTHS["news"]),
                "validation": numbered_documents([50] * 9, first=30_000),
            },
            "books": {"train": numbered_documents(LENGTHS["books"], first=10_000)},
        },
    )
    return path


def data_section(weights: tuple[float | None, float | None] = (None, None), **fields: object) -> Data:
    sources = tuple(
        TextSource(kind="text", path=label, label=label, weight=weight)
        for label, weight in zip(LENGTHS, weights, strict=True)
    )
    return Data(sources=sources, **fields)


def open_mix(folder: Path, mix: str = "one pool") -> RunSamples:
    return open_run_samples(folder, data_section(**MIXES[mix]), SEQUENCE_LENGTH, SEED)


@pytest.fixture(params=MIXES)
def samples(request: pytest.FixtureRequest, folder: Path) -> RunSamples:
    return open_mix(folder, request.param)


def read_micro_batches(
    samples: RunSamples, world_size: int, steps: range, micro_batch_size: int = 1
) -> list[list[MicroBatch]]:
    """The micro-batches of whole steps, by rank."""
    by_rank = []
    for rank in range(world_size):
        batches = training_micro_batches(
            samples,
            start_step=steps.start,
            global_batch_size=GLOBAL_BATCH_SIZE,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        by_rank.append(list(islice(batches, len(steps) * GLOBAL_BATCH_SIZE // (micro_batch_size * world_size))))
        batches.close()
    return by_rank


def read_steps(samples: RunSamples, world_size: int, steps: range, micro_batch_size: int = 1) -> torch.Tensor:
    """Inputs and labels of whole steps, rank after rank; (steps, sequences, 2 x sequence_length)."""
    rows = [
        torch.cat([torch.cat([batch["input_ids"], batch["labels"]], dim=1) for batch in batches])
        for batches in read_micro_batches(samples, world_size, steps, micro_batch_size)
    ]
    return torch.cat([own.reshape(len(steps), GLOBAL_BATCH_SIZE // world_size, -1) for own in rows], dim=1)


def as_rows(tensor: torch.Tensor) -> list[Row]:
    return [tuple(row) for row in tensor.flatten(0, 1).tolist()]


def rows_of(samples: Samples) -> list[Row]:
    """Inputs and labels of every sample of a source."""
    rows = samples.read(np.arange(len(samples)))
    return [tuple(row) for row in np.concatenate([rows.inputs, rows.labels], axis=1).tolist()]


# --- every sample once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(samples: RunSamples, world_size: int) -> None:
    steps = range(5, 9)
    run_samples = np.arange(steps.start * GLOBAL_BATCH_SIZE, steps.stop * GLOBAL_BATCH_SIZE)
    expected = samples.read(samples.draw(run_samples))
    read = read_steps(samples, world_size, steps).flatten(0, 1)
    assert read.tolist() == np.concatenate([expected.inputs, expected.labels], axis=1).tolist()


def once_an_epoch(samples: RunSamples, read: list[Row]) -> None:
    """Asserts that in what was read from the start of a run, each epoch of each pool holds each sample once."""
    if samples.mixture.sources[0].weight is None:
        pools = [[row for source in samples.sources for row in rows_of(source)]]
    else:
        pools = [rows_of(source) for source in samples.sources]
    for pool in pools:
        assert len(set(pool)) == len(pool)
        own = [row for row in read if row in set(pool)]
        assert len(own) >= 2 * len(pool)
        for epoch in range(len(own) // len(pool)):
            assert Counter(own[epoch * len(pool) : (epoch + 1) * len(pool)]) == Counter(pool)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_sample_is_read_once_an_epoch(samples: RunSamples, world_size: int) -> None:
    once_an_epoch(samples, as_rows(read_steps(samples, world_size, range(30))))


@pytest.mark.parametrize("worlds", [(1, 1), (2, 2), (8, 8), (8, 3), (1, 8), (3, 2)])
def test_every_sample_is_read_once_an_epoch_across_a_resume(samples: RunSamples, worlds: tuple[int, int]) -> None:
    before, after = (read_steps(samples, world_size, steps) for world_size, steps in zip(worlds, RESUMED, strict=True))
    once_an_epoch(samples, as_rows(torch.cat([before, after])))


RESUMED = (range(5), range(5, 30))
"""Five steps are in the middle of an epoch of every pool but the smallest."""


def test_the_micro_batch_size_changes_no_step(samples: RunSamples) -> None:
    one, six = (read_steps(samples, 2, range(3), micro_batch_size=size) for size in (1, 6))
    assert torch.equal(one, six)


# --- what a micro-batch holds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "names"),
    [
        ("one pool", {"input_ids", "labels"}),
        ("best fit", {"input_ids", "labels", "position_ids", "loss_tokens"}),
        ("a weighted mix, best fit", {"input_ids", "labels", "loss_tokens"}),
    ],
)
def test_a_micro_batch_holds_what_its_data_needs(folder: Path, mix: str, names: set[str]) -> None:
    [[batch]] = [batches[:1] for batches in read_micro_batches(open_mix(folder, mix), 1, range(1), micro_batch_size=4)]
    assert set(batch) == names
    for name in names - {"loss_tokens"}:
        assert (batch[name].shape, batch[name].dtype) == ((4, SEQUENCE_LENGTH), torch.int64)
    if "loss_tokens" in names:
        assert (batch["loss_tokens"].shape, batch["loss_tokens"].dtype) == ((), torch.float32)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 24), (2, 3), (3, 4), (8, 1), (8, 3)])
def test_the_mean_over_micro_batches_and_ranks_is_the_mean_over_counted_tokens(
    folder: Path, world_size: int, micro_batch_size: int
) -> None:
    samples = open_mix(folder, "best fit")
    by_rank = read_micro_batches(samples, world_size, range(4, 5), micro_batch_size)
    losses = torch.rand(2**16, dtype=torch.float64)  # of a token, by its id

    def summed(batch: MicroBatch) -> torch.Tensor:
        counted = batch["labels"] != IGNORED_LABEL
        return losses[batch["labels"][counted]].sum()

    batches = [batch for own in by_rank for batch in own]
    mean = torch.stack([summed(batch) / batch["loss_tokens"] for batch in batches]).mean()
    labels = torch.cat([batch["labels"] for batch in batches])
    assert (labels == IGNORED_LABEL).any()
    assert mean.item() == pytest.approx(losses[labels[labels != IGNORED_LABEL]].mean().item(), rel=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory is CUDA's")
def test_micro_batches_are_pinned_for_a_gpu(folder: Path) -> None:
    batches = training_micro_batches(
        open_mix(folder, "best fit"),
        start_step=0,
        global_batch_size=4,
        micro_batch_size=2,
        rank=0,
        world_size=1,
        pin=True,
    )
    assert all(tensor.is_pinned() for tensor in next(batches).values())


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("max_sequences", [1, 7, 10**6])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_validation_covers_every_sample_once(
    folder: Path, world_size: int, micro_batch_size: int, max_sequences: int, packing: str
) -> None:
    sets = open_validation_samples(folder, data_section(packing=packing), SEQUENCE_LENGTH)
    samples = sets.pop("news")
    assert sets == {}
    by_rank = [
        list(
            validation_micro_batches(
                samples,
                max_sequences=max_sequences,
                micro_batch_size=micro_batch_size,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    assert all(batch["labels"].shape == (micro_batch_size, SEQUENCE_LENGTH) for own in by_rank for batch in own)
    labels = torch.cat([batch["labels"] for batches in by_rank for batch in batches]).tolist()
    counted = [row for row in labels if set(row) != {IGNORED_LABEL}]
    expected = samples.read(np.arange(min(max_sequences, len(samples)))).labels.tolist()
    assert sorted(counted) == sorted(expected)


# --- the thread -------------------------------------------------------------------------------------------------------


class Recording:
    """A source of one sample that tells which threads read it, and may fail."""

    sequence_length = SEQUENCE_LENGTH
    pads = False
    padding_share = 0.0

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return 1

    def read(self, ids: Integers) -> Rows:
        self.threads.add(threading.current_thread().name)
        if self.fails:
            raise DataError("the disk is gone")
        return Rows(*np.zeros((2, len(ids), SEQUENCE_LENGTH), dtype=np.int64), positions=None)

    def num_labels(self, ids: Integers) -> Integers:
        return np.full(len(ids), SEQUENCE_LENGTH)


def micro_batches_of(source: Recording) -> Iterator[MicroBatch]:
    samples = RunSamples([source], Mixture([MixedSource("text", 1, None)], SEED))
    return training_micro_batches(samples, start_step=0, global_batch_size=2, micro_batch_size=2, rank=0, world_size=1)


def test_reading_is_off_the_training_thread() -> None:
    source = Recording()
    batches = micro_batches_of(source)
    next(batches)
    batches.close()
    assert source.threads
    assert threading.current_thread().name not in source.threads


def test_a_fault_while_reading_ahead_reaches_the_reader() -> None:
    with pytest.raises(DataError, match="the disk is gone"):
        next(micro_batches_of(Recording(fails=True)))


def test_closing_the_iterator_ends_its_thread() -> None:
    batches = micro_batches_of(Recording())
    next(batches)
    assert reading_threads()
    batches.close()
    assert not reading_threads()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
