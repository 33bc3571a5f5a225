"""States and gradients of GPT-2 small at every stage, against hand arithmetic."""

from __future__ import annotations

import pytest

from dsllm.plan.moments import Held, Moment, moments
from dsllm.plan.states import Device, Layout, host_bytes, optimizer_bytes, parameters_bytes
from dsllm.plan.workload import workload
from dsllm.spec.load import load_spec

P = 124_475_904  # GPT-2 small with 50,304 rows
E = 50_304 * 768
BLOCK = 7_087_872
BUCKET = 50_000_000
# From the last block back: seven blocks fill a bucket (a whole eighth would not fit, its first tensors do); the
# embedding comes alone.


def layout(*overrides: str, world_size: int = 4, accumulates: bool = False, device: Device = "cuda") -> Layout:
    run = workload(load_spec("gpt2-124m", overrides))
    return Layout(run, world_size, device, accumulates, P)


def at(moment: Moment, *overrides: str, **settings: object) -> Held:
    return moments(layout(*overrides, **settings))[moment]


@pytest.mark.parametrize(
    ("overrides", "weights", "states"),
    [
        (["zero.stage=0"], 2 * P, 12 * P),
        (["zero.stage=0", "training.precision=fp32"], 4 * P, 8 * P),
        (["zero.stage=1"], 2 * P, 3 * P),
        (["zero.stage=2"], 2 * P, 3 * P),
        (["zero.stage=2", "training.precision=fp32"], 4 * P, 3 * P),
        (["zero.stage=2", "zero.offload_optimizer=cpu"], 2 * P, 0),
        (["zero.stage=3"], P // 2, 3 * P),
        (["zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_param=cpu"], 0, 0),
    ],
)
def test_weights_and_optimizer_states_of_four_ranks(overrides: list[str], weights: int, states: int) -> None:
    assert P % 4 == 0
    assert (parameters_bytes(layout(*overrides)), optimizer_bytes(layout(*overrides))) == (weights, states)


def test_stage_0_keeps_whole_gradients_and_reduces_a_flat_copy() -> None:
    assert at("forward", "zero.stage=0") == Held()
    assert at("forward", "zero.stage=0", accumulates=True) == Held(2 * P)
    assert at("reduction", "zero.stage=0") == Held(2 * P, 2 * P)
    # fp32 gradients and a flat copy of them, in half precision only
    assert at("update", "zero.stage=0") == Held(2 * P, 0, 8 * P)
    assert at("update", "zero.stage=0", "training.precision=fp32") == Held(4 * P)


def test_tied_weights_have_two_gradients_when_the_embedding_s_comes_and_three_after_the_plain_loss() -> None:
    assert at("embedding", "zero.stage=0") == Held(2 * (P - E) + 2 * 2 * E)
    assert at("embedding", "zero.stage=0", "training.loss=plain") == Held(2 * (P - E) + 2 * 3 * E)
    untied = layout("zero.stage=0", "model.tie_word_embeddings=false")
    assert moments(untied)["embedding"] == Held(2 * (P - E) + 2 * E)


def test_stage_1_in_bf16_has_whole_fp32_gradients_always() -> None:
    assert at("forward", "zero.stage=1") == Held(4 * P)
    assert at("forward", "zero.stage=1", accumulates=True) == Held(6 * P)
    assert at("reduction", "zero.stage=1") == Held(6 * P, 6 * P)  # a flat fp32 copy, and its cast for the wire
    assert at("update", "zero.stage=1") == Held(6 * P)
    assert at("update", "zero.stage=1", device="cpu") == Held(6 * P, 2 * P)  # gloo gathers into a copy


def test_stage_2_in_bf16_adds_up_in_a_flat_fp32_partition() -> None:
    overrides = ["zero.stage=2", "model.vocab_size=50304"]
    partition = layout(*overrides).partition
    assert partition.elements == P // 4
    assert at("forward", *overrides) == Held()
    assert at("forward", *overrides, accumulates=True) == Held(P)
    assert at("embedding", *overrides) == Held(P + 2 * 2 * E, 2 * BUCKET)
    # the embedding is cut among ranks, so it is copied to be reduced, and the largest piece cast
    assert at("reduction", *overrides) == Held(P, 2 * BUCKET + 2 * E, 4 * partition.largest_piece)
    assert at("norm", *overrides) == Held(P, 0, 8 * partition.largest_piece)
    assert at("update", *overrides) == Held(P)


def test_stage_2_in_fp32_keeps_whole_tensors() -> None:
    overrides = ["zero.stage=2", "training.precision=fp32"]
    partition = layout(*overrides).partition
    beside = 4 * (partition.touched - partition.elements)
    assert at("forward", *overrides, accumulates=True) == Held(P, beside)
    assert at("norm", *overrides) == Held(P, beside, 8 * partition.largest_piece)
    # those of this micro-batch beside those before it
    assert at("embedding", *overrides, accumulates=True) == Held(2 * P + 2 * 4 * E, 2 * beside + 4 * BUCKET)


def test_a_bucket_smaller_than_what_is_kept_beside_it_is_still_counted() -> None:
    overrides = ["zero.stage=2", "training.precision=fp32", "zero.reduce_bucket_elements=1000"]
    beside = at("forward", *overrides, accumulates=True).communication
    assert beside > 4 * 1000
    assert at("last_block", *overrides, accumulates=True).communication == beside + 4 * 1000


def test_stage_1_in_fp32_keeps_everything_until_the_last_micro_batch() -> None:
    overrides = ["zero.stage=1", "training.precision=fp32"]
    assert at("forward", *overrides, accumulates=True) == Held(4 * P, 4 * BUCKET)
    assert at("forward", *overrides) == Held()


def test_overlapping_reduction_has_two_buckets_below_stage_3() -> None:
    assert at("last_block", "zero.stage=2", "zero.overlap_comm=true").communication == 2 * 2 * BUCKET


def test_stage_3_gathers_live_weights_into_a_bucket_s_company() -> None:
    overrides = ["zero.stage=3"]
    vectors = 12 * (9 + 4) * 768 + 2 * 768  # of up to ten widths: every vector of GPT-2
    fixed = 2 * BUCKET + 2 * vectors
    live = E + 3 * BLOCK
    assert at("forward", *overrides) == Held(P, fixed + 2 * live)
    # twelve blocks are more than what may live: the embedding is fetched anew for the head
    assert at("head_fetch", *overrides) == Held(P, fixed + 2 * (live + E + BLOCK))
    assert at("norm", *overrides) == Held(P, fixed, 8 * E // 4)
    assert at("update", *overrides).temporaries == 4 * P // 4


def test_one_rank_gathers_nothing() -> None:
    assert at("forward", "zero.stage=3", world_size=1).communication == 2 * BUCKET


def test_an_offloaded_optimizer_leaves_no_gradients_behind() -> None:
    overrides = ["zero.stage=2", "zero.offload_optimizer=cpu"]
    assert at("forward", *overrides, accumulates=True) == Held()
    assert "update" not in moments(layout(*overrides))


def test_offloaded_states_are_on_the_host_in_full() -> None:
    assert host_bytes(layout("zero.stage=2", "zero.offload_optimizer=cpu")) == (12 + 4 + 2) * P
    overrides = ["zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_param=cpu"]
    assert host_bytes(layout(*overrides)) == (12 + 4 + 4 + 2) * P
    assert host_bytes(layout("zero.stage=3")) == 0
