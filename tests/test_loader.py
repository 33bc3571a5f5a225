"""The loader: every token predicted once an epoch, the same step on any number of ranks, nothing hidden by a thread."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small_text import text_spec, write_corpus

from dsllm.data.loader import (
    IGNORED_LABEL,
    MicroBatch,
    TokenSamples,
    step_sample_ids,
    training_micro_batches,
    validation_micro_batches,
)
from dsllm.data.prepare import prepare
from dsllm.data.shards import TokenShards
from dsllm.errors import DataError

SEQUENCE_LENGTH = 32
SEED = 1337


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    prepare(text_spec(write_corpus(folder / "corpus"), "data.shard_tokens=1500"), folder / "data", processes=1)
    return folder / "data"


@pytest.fixture(scope="module")
def samples(prepared: Path) -> TokenSamples:
    return TokenSamples.open(prepared, "train", SEQUENCE_LENGTH)


@pytest.fixture(scope="module")
def validation(prepared: Path) -> TokenSamples:
    return TokenSamples.open(prepared, "validation", SEQUENCE_LENGTH)


def read_steps(
    samples: TokenSamples, world_size: int, num_steps: int, start_step: int = 0, micro_batch_size: int = 2
) -> torch.Tensor:
    """Input ids of whole steps, rank after rank; (steps, 24, sequence_length)."""
    micro_batches = 24 // (micro_batch_size * world_size)
    by_rank = []
    for rank in range(world_size):
        batches = training_micro_batches(
            samples,
            seed=SEED,
            start_step=start_step,
            global_batch_size=24,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        rows = torch.cat([batch["input_ids"] for batch in islice(batches, num_steps * micro_batches)])
        by_rank.append(rows.reshape(num_steps, 24 // world_size, -1))
    return torch.cat(by_rank, dim=1)


def test_samples_tile_the_stream_and_share_one_token(prepared: Path, samples: TokenSamples) -> None:
    shards = TokenShards.open(prepared, "train")
    stream = shards.read(0, len(shards)).astype(np.int64)
    assert len(shards.manifest.splits["train"].shards) > 3
    assert len(samples) == (len(stream) - 1) // SEQUENCE_LENGTH
    for index in range(len(samples)):
        start = index * SEQUENCE_LENGTH
        assert samples[index].dtype == np.int64
        assert samples[index].tolist() == stream[start : start + SEQUENCE_LENGTH + 1].tolist()


def test_too_few_tokens_for_a_sample_prints_both_numbers(prepared: Path) -> None:
    tokens = len(TokenShards.open(prepared, "validation"))
    assert len(TokenSamples.open(prepared, "validation", tokens - 1)) == 1
    with pytest.raises(
        DataError, match=rf"the validation split holds {tokens} tokens, and one sample needs {tokens + 1}"
    ):
        TokenSamples.open(prepared, "validation", tokens)


def test_labels_are_the_tokens_that_follow(samples: TokenSamples) -> None:
    batches = training_micro_batches(
        samples, seed=SEED, start_step=3, global_batch_size=8, micro_batch_size=4, rank=0, world_size=1
    )
    for row, batch in zip((0, 4), batches, strict=False):
        ids = step_sample_ids(SEED, len(samples), 3, 8)[row : row + 4]
        expected = torch.from_numpy(np.stack([samples[index] for index in ids]))
        assert torch.equal(batch["input_ids"], expected[:, :-1])
        assert torch.equal(batch["labels"], expected[:, 1:])
        assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(samples: TokenSamples, world_size: int) -> None:
    assert torch.equal(read_steps(samples, world_size, num_steps=4), read_steps(samples, 1, num_steps=4))


def test_the_micro_batch_size_changes_no_step(samples: TokenSamples) -> None:
    one, six = (read_steps(samples, 2, num_steps=3, micro_batch_size=size) for size in (1, 6))
    assert torch.equal(one, six)


def test_a_resume_on_other_ranks_goes_on_at_the_next_sample(samples: TokenSamples) -> None:
    whole = read_steps(samples, 1, num_steps=6)
    resumed = torch.cat([read_steps(samples, 2, num_steps=2), read_steps(samples, 3, num_steps=4, start_step=2)])
    assert torch.equal(whole, resumed)


def test_every_sample_is_read_once_an_epoch_across_a_resume(samples: TokenSamples) -> None:
    steps = -(-2 * len(samples) // 24)
    ids = np.concatenate([step_sample_ids(SEED, len(samples), step, 24) for step in range(steps)])
    for epoch in range(2):
        assert sorted(ids[epoch * len(samples) : (epoch + 1) * len(samples)].tolist()) == list(range(len(samples)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("max_sequences", [1, 7, 10**6])
def test_validation_covers_every_sample_once(
    validation: TokenSamples, world_size: int, micro_batch_size: int, max_sequences: int
) -> None:
    by_rank = [
        list(
            validation_micro_batches(
                validation,
                max_sequences=max_sequences,
                micro_batch_size=micro_batch_size,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    counted = [row for batches in by_rank for batch in batches for row in counted_rows(batch, micro_batch_size)]
    expected = [tuple(validation[index].tolist()) for index in range(min(max_sequences, len(validation)))]
    assert sorted(counted) == sorted(expected)


def counted_rows(batch: MicroBatch, micro_batch_size: int) -> list[tuple[int, ...]]:
    """Whole samples of the rows that are not padding."""
    assert batch["input_ids"].shape == batch["labels"].shape == (micro_batch_size, SEQUENCE_LENGTH)
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    samples = [(*inputs, labels[-1]) for inputs, labels in rows if set(labels) != {IGNORED_LABEL}]
    assert all(IGNORED_LABEL not in sample for sample in samples)
    return samples


def test_a_fault_while_reading_ahead_reaches_the_reader(samples: TokenSamples) -> None:
    class Unreadable(TokenSamples):
        def __getitem__(self, index: int) -> np.ndarray:
            raise DataError("the disk is gone")

    batches = training_micro_batches(
        Unreadable(samples.shards, SEQUENCE_LENGTH),
        seed=SEED,
        start_step=0,
        global_batch_size=2,
        micro_batch_size=2,
        rank=0,
        world_size=1,
    )
    with pytest.raises(DataError, match="the disk is gone"):
        next(batches)


def test_closing_the_iterator_ends_its_thread(samples: TokenSamples) -> None:
    batches = training_micro_batches(
        samples, seed=SEED, start_step=0, global_batch_size=2, micro_batch_size=2, rank=0, world_size=1
    )
    next(batches)
    assert reading_threads()
    batches.close()
    assert not reading_threads()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
