"""Which batch a step takes: every one that is not skipped, once, in order."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from small_shards import numbered_documents, write_folder

from dsllm.data.batches import batch_of, samples_of, share_of
from dsllm.data.loader import training_micro_batches
from dsllm.data.run_samples import open_run_samples
from dsllm.spec.sections import Data, TextSource

SKIPPED = st.sets(st.integers(0, 60), max_size=12)


@given(SKIPPED)
def test_every_batch_that_is_not_skipped_is_taken_once_and_in_order(skipped: set[int]) -> None:
    taken = [batch_of(step, skipped) for step in range(80 - len(skipped))]
    assert taken == [batch for batch in range(80) if batch not in skipped]


@given(SKIPPED, st.integers(0, 60))
def test_skipping_the_batch_of_a_step_leaves_all_earlier_steps_as_they_were(skipped: set[int], step: int) -> None:
    more = skipped | {batch_of(step, skipped)}
    assert [batch_of(earlier, more) for earlier in range(step)] == [
        batch_of(earlier, skipped) for earlier in range(step)
    ]
    assert batch_of(step, more) == batch_of(step + 1, skipped)


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 8))
def test_the_shares_of_the_ranks_make_up_the_batch(batch: int, world_size: int, rows: int) -> None:
    samples = samples_of(batch, world_size * rows)
    shares = [share_of(samples, rank, world_size) for rank in range(world_size)]
    assert [sample for share in shares for sample in share] == list(samples)
    assert samples.start == batch * world_size * rows


def test_the_loader_leaves_out_what_is_skipped(tmp_path: Path) -> None:
    write_folder(tmp_path, {"news": {"train": numbered_documents([20, 75, 31, 150] * 12)}})
    data = Data(sources=(TextSource(kind="text", path="news", label="news"),))
    samples = open_run_samples(tmp_path, data, 16, seed=1)

    def read(start_step: int, count: int, *skipped: int) -> torch.Tensor:
        batches = training_micro_batches(
            samples,
            start_step=start_step,
            global_batch_size=4,
            micro_batch_size=1,
            rank=1,
            world_size=2,
            skipped_batches=skipped,
        )
        rows = torch.cat([batch["input_ids"] for batch in islice(batches, 2 * count)])
        batches.close()
        return rows

    everything = read(0, 8).view(8, 2, 16)
    assert read(0, 5, 4, 2).view(5, 2, 16).tolist() == everything[[0, 1, 3, 5, 6]].tolist()
    assert read(3, 2, 4, 2).view(2, 2, 16).tolist() == everything[[5, 6]].tolist()
