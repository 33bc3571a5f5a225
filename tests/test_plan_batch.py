"""The batch is solved exactly or refused with the sizes nearby."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsllm.errors import UserError
from dsllm.plan.batch import micro_batch_choices, resolve_batch
from dsllm.spec.sections import Batch

sizes = st.integers(min_value=1, max_value=64)


def batch(global_batch_size: int, micro_batch_size: int | str) -> Batch:
    return Batch(sequence_length=128, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)


@given(sizes, sizes, sizes)
def test_micro_times_accumulation_times_ranks_is_the_batch(micro: int, accumulation: int, ranks: int) -> None:
    plan = resolve_batch(batch(micro * accumulation * ranks, micro), ranks)
    assert (plan.gradient_accumulation_steps, plan.world_size) == (accumulation, ranks)
    assert plan.tokens_per_step == micro * accumulation * ranks * 128


@given(st.integers(min_value=1, max_value=500), sizes, sizes)
def test_a_remainder_is_refused_and_every_size_that_is_offered_works(whole: int, micro: int, ranks: int) -> None:
    if whole % (micro * ranks) == 0:
        return
    with pytest.raises(UserError, match="try global_batch_size") as refusal:
        resolve_batch(batch(whole, micro), ranks)
    offers = str(refusal.value).split("try global_batch_size ")[1].split(", or ")
    for size in offers[0].split(" or "):
        resolve_batch(batch(int(size), micro), ranks)
    for offer in offers[1:]:
        if offer.endswith(" ranks"):
            for count in offer.removesuffix(" ranks").split(" or "):
                resolve_batch(batch(whole, micro), int(count))
        else:
            for size in offer.removeprefix("micro_batch_size ").split(" or "):
                resolve_batch(batch(whole, int(size)), ranks)


def test_the_refusal_prints_the_numbers() -> None:
    with pytest.raises(UserError) as refusal:
        resolve_batch(batch(512, 8), 3)
    assert str(refusal.value) == (
        "batch.global_batch_size: given 512; micro_batch_size 8 on 3 ranks takes 24 sequences at a time, which must "
        "divide it; try global_batch_size 504 or 528, or 2 or 4 ranks"
    )


def test_a_chosen_micro_batch_counts_only_for_auto() -> None:
    assert resolve_batch(batch(32, "auto"), 2, micro_batch_size=4).micro_batch_size == 4
    assert resolve_batch(batch(32, 8), 2, micro_batch_size=4).micro_batch_size == 8


def test_auto_without_a_choice_is_refused() -> None:
    with pytest.raises(UserError, match=r"given auto where no device's memory is known; give a number"):
        resolve_batch(batch(32, "auto"), 2)


def test_choices_divide_the_share_of_a_rank() -> None:
    assert micro_batch_choices(24, 2) == [1, 2, 3, 4, 6, 12]
    with pytest.raises(UserError, match="try global_batch_size 20 or 25, or 4 or 6 ranks"):
        micro_batch_choices(24, 5)
