"""The terms of the memory estimate against hand arithmetic, and what must never go up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spec_strategies import specs

from dsllm.plan import memory
from dsllm.plan.activations import activations_bytes, layer_bytes_per_token, logits_bytes
from dsllm.plan.memory import MemoryEstimate, StateLayout, Terms, estimate_memory
from dsllm.plan.model_shape import model_shape
from dsllm.plan.search import at_stage
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec

MIB = 2**20
P = 124_475_904  # GPT-2 small with 50,304 rows
PADDED = 50_304 * 768


def states(*overrides: str, world_size: int = 1, accumulates: bool = False) -> tuple[int, int, int]:
    """Bytes of weights, of gradients at the end of backward, and of optimizer states, for GPT-2 small."""
    spec = load_spec("gpt2-124m", overrides)
    layout = StateLayout.of(spec, P, world_size)
    return (
        memory.parameters_bytes(spec, layout),
        memory.gradients_bytes(spec, layout, accumulates)[1],
        memory.optimizer_bytes(spec, layout),
    )


@pytest.mark.parametrize(
    ("overrides", "world_size", "by_hand"),
    [
        (["zero.stage=0"], 4, (2 * P, 2 * P, 12 * P)),
        (["zero.stage=0", "training.precision=fp32"], 4, (4 * P, 4 * P, 8 * P)),
        (["zero.stage=1"], 4, (2 * P, 6 * P, 3 * P)),
        (["zero.stage=1", "training.gradient_accumulation_precision=bf16"], 4, (2 * P, 2 * P, 3 * P)),
        (["zero.stage=2"], 4, (2 * P, P, 3 * P)),
        (["zero.stage=2", "training.gradient_accumulation_precision=bf16"], 4, (2 * P, P // 2, 3 * P)),
        (["zero.stage=2", "zero.offload_optimizer=cpu"], 4, (2 * P, 0, 0)),
        (["zero.stage=3"], 4, (P // 2, P, 3 * P)),
        (["zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_param=cpu"], 4, (0, 0, 0)),
    ],
)
def test_states_by_hand(overrides: list[str], world_size: int, by_hand: tuple[int, int, int]) -> None:
    assert P % 4 == 0
    assert states(*overrides, world_size=world_size) == by_hand


def test_accumulation_at_stage_2_holds_the_sum_beside_the_new_partition() -> None:
    assert states("zero.stage=2", world_size=4, accumulates=True)[1] == 2 * P


def test_offloaded_states_are_on_the_host_in_full() -> None:
    stage_2 = estimate_memory(load_spec("gpt2-124m", ["zero.stage=2", "zero.offload_optimizer=cpu"]), 4, 1)
    assert stage_2.host_bytes == (12 + 4 + 2) * P
    stage_3 = load_spec("gpt2-124m", ["zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_param=cpu"])
    assert estimate_memory(stage_3, 4, 1).host_bytes == (12 + 4 + 4 + 2) * P
    assert estimate_memory(load_spec("gpt2-124m"), 4, 1).host_bytes == 0


def test_a_gpt2_block_saves_what_autograd_was_seen_to_save() -> None:
    # 24,632 and 49,216 bytes a token were counted with saved-tensor hooks on the real block, bf16 and fp32
    bf16, fp32 = load_spec("gpt2-124m"), load_spec("gpt2-124m", ["training.precision=fp32"])
    assert layer_bytes_per_token(bf16, model_shape(bf16)) == 24_632
    assert layer_bytes_per_token(fp32, model_shape(fp32)) == 49_216


def test_a_llama_block_saves_what_autograd_was_seen_to_save() -> None:
    bf16, fp32 = load_spec("llama-248m"), load_spec("llama-248m", ["training.precision=fp32"])
    assert layer_bytes_per_token(bf16, model_shape(bf16)) == 54_408
    assert layer_bytes_per_token(fp32, model_shape(fp32)) == 100_488


def test_activations_by_hand() -> None:
    tokens, boundary = 8 * 1024, 2 * 768
    by_hand = {
        "none": 12 * 24_632,
        "selective": 6 * 24_632 + 6 * boundary + 24_632,
        "full": 12 * boundary + 24_632,
    }
    for checkpointing, block_bytes in by_hand.items():
        spec = load_spec("gpt2-124m", [f"training.activation_checkpointing={checkpointing}"])
        assert activations_bytes(spec, model_shape(spec), 8) == tokens * (block_bytes + 2 * boundary)


def test_plain_logits_by_hand() -> None:
    spec = load_spec("gpt2-124m", ["training.loss=plain"])
    assert logits_bytes(spec, model_shape(spec), 64) == (10 * 64 * 1024 * 50_304, 14 * 64 * 1024 * 50_304)


def test_chunked_logits_by_hand() -> None:
    spec = load_spec("gpt2-124m")
    hidden = 64 * 1024 * 768 * 2
    forward, backward = logits_bytes(spec, model_shape(spec), 64)
    # the projection's gradient in fp32 and a product in bf16, 64 MiB of fp32 logits and their bf16 gradient
    assert forward == hidden + 6 * PADDED + 96 * MIB
    assert backward == 2 * hidden + 4 * PADDED


def test_communication_by_hand() -> None:
    spec = load_spec("gpt2-124m", ["zero.stage=2"])
    shape, layout = model_shape(spec), StateLayout.of(spec, P, 4)
    assert memory.bucket_bytes(spec, shape, layout) == 2 * 50_000_000
    assert memory.gathered_bytes(spec, shape, layout) == 0
    whole = at_stage(spec, 3)
    assert memory.gathered_bytes(whole, shape, layout) == 2 * (PADDED + 3 * 7_087_872)
    none = at_stage(spec, 0)
    assert memory.engine_reduction_bytes(none, StateLayout.of(none, P, 4)) == 2 * P
    assert memory.engine_reduction_bytes(none, StateLayout.of(none, P, 1)) == 0


def test_the_step_at_stages_1_and_2_reaches_20_bytes_a_partitioned_parameter() -> None:
    for stage in (1, 2):
        overrides = [f"zero.stage={stage}", "training.gradient_accumulation_precision=bf16"]
        spec = load_spec("gpt2-124m", overrides)
        layout = StateLayout.of(spec, P, 4)
        assert memory.optimizer_bytes(spec, layout) + memory.step_bytes(spec, layout) == (12 + 6) * P // 4


def test_the_peak_is_the_sum_of_its_terms() -> None:
    estimate = estimate_memory(load_spec("1b"), 8, 8)
    document = estimate.as_dict()
    per_gpu = dict(document["per_gpu"])
    total = per_gpu.pop("total_bytes")
    assert total == sum(per_gpu.values()) == max(phase["total_bytes"] for phase in document["phases"].values())
    assert document["phases"][document["peak_phase"]]["total_bytes"] == total


def test_a_card_fits_with_a_margin() -> None:
    estimate = MemoryEstimate(1, 1, 0, 1, {"step": Terms(parameters_bytes=95 - 2, runtime_bytes=2)}, 0)
    assert estimate.fits(100)
    assert not estimate.fits(99)


def test_a_number_of_parameters_overrules_the_shape() -> None:
    estimate = estimate_memory(load_spec("gpt2-124m", ["zero.stage=0"]), 1, 1, parameters=10**9)
    assert estimate.phases["step"].parameters_bytes == 2 * 10**9


def model_states(spec: Spec, world_size: int) -> int:
    layout = StateLayout.of(spec, model_shape(spec).allocated_parameters, world_size)
    return (
        memory.parameters_bytes(spec, layout)
        + memory.optimizer_bytes(spec, layout)
        + memory.gradients_bytes(spec, layout, accumulates=False)[1]
    )


@given(specs, st.integers(1, 64), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_more_ranks_never_raise_model_states(spec: Spec, world_size: int, stage: int) -> None:
    staged = at_stage(spec, stage)
    assert model_states(staged, world_size + 1) <= model_states(staged, world_size)


@given(specs, st.integers(1, 64))
@settings(max_examples=80, deadline=None)
def test_a_higher_stage_never_raises_model_states(spec: Spec, world_size: int) -> None:
    # From stage 1 on; stage 0 adds gradients up in the type of the weights, which takes less than fp32 on few ranks.
    plain = spec.model_copy(update={"zero": spec.zero.model_copy(update={"stage": 3, "offload_optimizer": "none"})})
    by_stage = [model_states(at_stage(plain, stage), world_size) for stage in (1, 2, 3)]
    assert by_stage == sorted(by_stage, reverse=True)


@given(specs, st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_a_larger_micro_batch_never_takes_less(spec: Spec, size: int) -> None:
    # with accumulation on both sides: a micro-batch that makes it needless spares the gradients kept meanwhile
    accumulating = spec.model_copy(update={"batch": spec.batch.model_copy(update={"global_batch_size": 1000})})
    smaller, larger = (estimate_memory(accumulating, 1, micro).peak.total_bytes for micro in (size, size + 1))
    assert smaller <= larger
