"""The memory estimate as a whole: how its terms meet, and what must never go up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from spec_strategies import specs

from dsllm.plan.activations import Activations, activations
from dsllm.plan.memory import PHASES, MemoryEstimate, Terms, estimate_memory
from dsllm.plan.moments import moments
from dsllm.plan.states import Layout, optimizer_bytes, parameters_bytes
from dsllm.plan.workload import Precision, Workload, ZeroSettings, workload
from dsllm.spec.load import load_spec

P = 124_475_904
CHECKPOINTINGS = ("none", "selective", "full")
workloads = specs.map(workload)


def test_the_peak_is_the_sum_of_its_terms() -> None:
    document = estimate_memory(workload(load_spec("1b")), 8, 8).as_dict()
    per_gpu = dict(document["per_gpu"])
    total = per_gpu.pop("total_bytes")
    assert total == sum(per_gpu.values()) == max(phase["total_bytes"] for phase in document["phases"].values())
    assert document["phases"][document["peak_phase"]]["total_bytes"] == total
    assert all(isinstance(value, int) for value in per_gpu.values())


def test_forward_is_states_and_activations_and_the_loss() -> None:
    run = workload(load_spec("gpt2-124m", ["zero.stage=2"]))
    acts = activations(run, 8)
    assert estimate_memory(run, 8, 8, runtime_bytes=0).phases["forward"] == Terms(
        parameters_bytes=2 * P,
        gradients_bytes=4 * P // 8,  # 512 sequences: earlier micro-batches left some
        optimizer_bytes=12 * P // 8,
        activations_bytes=acts.saved_bytes,
        logits_bytes=acts.loss_forward_bytes,
        runtime_bytes=0,
    )


def test_a_card_fits_with_a_margin() -> None:
    terms = Terms(parameters_bytes=95 - 2, runtime_bytes=2)
    estimate = MemoryEstimate(1, 1, 1, 0, 1, {"step": terms}, terms, 0)
    assert estimate.fits(100)
    assert not estimate.fits(99)


def test_a_number_of_parameters_overrules_the_shape() -> None:
    run = workload(load_spec("gpt2-124m", ["zero.stage=0"]))
    assert estimate_memory(run, 1, 1, parameters=10**9).phases["step"].parameters_bytes == 2 * 10**9


def test_traced_activations_overrule_the_arithmetic() -> None:
    run = workload(load_spec("gpt2-124m"))
    traced = Activations(10**12, 1, 1, 1, 1)
    assert estimate_memory(run, 8, 8, traced=traced).peak.activations_bytes == 10**12


def test_the_runtime_is_the_device_s_constant_and_nothing_on_the_cpu() -> None:
    run = workload(load_spec("gpt2-124m"))
    assert estimate_memory(run, 8, 8, runtime_bytes=5).peak.runtime_bytes == 5
    assert estimate_memory(run, 8, 8, device="cpu").peak.runtime_bytes == 0
    on_gpu = estimate_memory(run, 8, 8)
    assert on_gpu.tensor_bytes("forward") == on_gpu.phases["forward"].total_bytes - on_gpu.peak.runtime_bytes


def test_every_phase_is_there() -> None:
    for stage in range(4):
        run = workload(load_spec("gpt2-124m")).at_stage(stage)
        assert set(estimate_memory(run, 2, 1).phases) == set(PHASES)
    offloaded = replace(run, zero=ZeroSettings(stage=2, offload_optimizer="cpu"))
    assert set(estimate_memory(offloaded, 2, 1).phases) == set(PHASES)


def model_states(run: Workload, world_size: int) -> int:
    """Weights, optimizer states, and the gradients that the step reads."""
    layout = Layout(run, world_size, "cuda", False, run.shape.allocated_parameters)
    held = moments(layout)
    gradients = held["update"].gradients if "update" in held else 0
    return parameters_bytes(layout) + optimizer_bytes(layout) + gradients


@given(workloads, st.integers(1, 64), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_more_ranks_never_raise_model_states(run: Workload, world_size: int, stage: int) -> None:
    staged = run.at_stage(stage)
    assert model_states(staged, world_size + 1) <= model_states(staged, world_size)


@given(workloads, st.integers(1, 64))
@settings(max_examples=80, deadline=None)
def test_a_higher_stage_never_raises_model_states(run: Workload, world_size: int) -> None:
    # From stage 1 on; stage 0 adds gradients up in the type of the weights, which takes less than fp32 on few ranks.
    plain = replace(run, zero=ZeroSettings(stage=3))
    by_stage = [model_states(plain.at_stage(stage), world_size) for stage in (1, 2, 3)]
    assert by_stage == sorted(by_stage, reverse=True)


@given(workloads, st.integers(1, 64), st.sampled_from(["bf16", "fp16"]))
@settings(max_examples=80, deadline=None)
def test_stage_1_never_takes_more_than_stage_0_in_16_bits_at_the_same_accumulation_type(
    run: Workload, world_size: int, precision: Precision
) -> None:
    # not so in fp32 on one rank, where ZeRO copies weights that are their own master at stage 0
    staged = replace(run, precision=precision, gradient_accumulation_precision=precision, zero=ZeroSettings(stage=1))
    rounding = 2 * 14  # the shares of both groups are even
    assert model_states(staged, world_size) <= model_states(staged.at_stage(0), world_size) + rounding


@given(workloads, st.integers(1, 64))
@settings(max_examples=80, deadline=None)
def test_more_offload_never_raises_model_states(run: Workload, world_size: int) -> None:
    zeros = [
        ZeroSettings(stage=3),
        ZeroSettings(stage=3, offload_optimizer="cpu"),
        ZeroSettings(stage=3, offload_optimizer="cpu", offload_param="cpu"),
    ]
    staged = [replace(run, zero=zero) for zero in zeros]
    sizes = [model_states(one, world_size) for one in staged]
    assert sizes == sorted(sizes, reverse=True)
    totals = [estimate_memory(one, world_size, 1).peak.total_bytes for one in staged]
    assert totals == sorted(totals, reverse=True)


def total(run: Workload, micro_batch_size: int) -> int:
    """With accumulation: a micro-batch that makes it needless spares the gradients that are kept meanwhile."""
    return estimate_memory(replace(run, global_batch_size=10**6), 2, micro_batch_size).peak.total_bytes


@given(workloads, st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_a_larger_micro_batch_never_takes_less(run: Workload, size: int) -> None:
    assert total(run, size) <= total(run, size + 1)


@given(workloads, st.integers(1, 500))
@settings(max_examples=60, deadline=None)
def test_a_longer_sequence_never_takes_less(run: Workload, more: int) -> None:
    assert total(run, 2) <= total(replace(run, sequence_length=run.sequence_length + more), 2)


@given(workloads, st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_less_checkpointing_never_takes_less(run: Workload, size: int) -> None:
    assume(run.shape.num_layers > 2)  # of one or two blocks, as much is computed again as is kept
    none, selective, full = (total(replace(run, activation_checkpointing=kind), size) for kind in CHECKPOINTINGS)
    # but for the input of one block, which is kept beside the fp32 copy that is made of it again
    slack = run.element_bytes * run.shape.hidden_size * size * run.sequence_length
    assert none + slack >= selective
    assert selective + slack >= full


@pytest.mark.parametrize("preset", ["gpt2-124m", "1b", "llama-7b"])
def test_thousands_of_ranks_are_no_other_case(preset: str) -> None:
    run = replace(workload(load_spec(preset)).at_stage(3), global_batch_size=4096)
    few, many = (estimate_memory(run, ranks, 1) for ranks in (8, 4096))
    assert many.peak.total_bytes < few.peak.total_bytes
    assert many.peak.optimizer_bytes == 12 * -(-run.shape.allocated_parameters // 4096)
