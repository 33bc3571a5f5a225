"""What to change when a run does not fit: the cheapest change that does, and nothing that does not."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllm.plan.advice import Advice, advise
from dsllm.plan.hardware import Gpu, gpu_named
from dsllm.plan.memory import FITTING_SHARE, MemoryEstimate, estimate_memory
from dsllm.plan.typical import typical_workload
from dsllm.plan.way import Way, changed_settings
from dsllm.plan.workload import workload
from dsllm.spec.load import load_spec, preset_names

GIB = 2**30
PRESETS = {name: workload(load_spec(name)) for name in preset_names()}


def predict(way: Way) -> MemoryEstimate:
    return estimate_memory(way.run, way.world_size, way.micro_batch_size)


def given_way(preset: str, *overrides: str, world_size: int = 1, micro_batch_size: int = 1) -> Way:
    return Way(workload(load_spec(preset, overrides)), world_size, micro_batch_size)


def just_too_small_for(way: Way, share: float = 0.999) -> Gpu:
    """A GPU that lacks a little of what the run needs, or all but a share of it."""
    return replace(gpu_named("a100-80gb"), memory_bytes=round(share * predict(way).peak.total_bytes / FITTING_SHARE))


def advice_for(way: Way, share: float = 0.999, more_ranks: bool = True) -> Advice:
    return advise(way, just_too_small_for(way, share), predict, more_ranks)


def test_a_smaller_micro_batch_comes_first_and_divides_the_batch() -> None:
    advice = advice_for(given_way("gpt2-124m", "zero.stage=2", world_size=8, micro_batch_size=64))
    assert advice.fits
    assert advice.settings == {"batch.micro_batch_size": 32}
    assert advice.world_size is None


def test_a_batch_that_nobody_gave_keeps_its_micro_batches() -> None:
    run = replace(typical_workload(10**9), global_batch_size=8).at_stage(3)
    advice = advice_for(Way(run, world_size=2, micro_batch_size=4, has_batch=False))
    assert advice.settings == {"batch.micro_batch_size": 2}


def test_a_higher_stage_comes_before_checkpointing() -> None:
    advice = advice_for(given_way("gpt2-1558m", "zero.stage=1", world_size=8), 0.7)
    assert advice.settings == {"zero.stage": 2}


def test_the_loss_in_chunks_comes_before_checkpointing() -> None:
    way = given_way("gpt2-124m", "zero.stage=3", "training.loss=plain", micro_batch_size=1)
    assert advice_for(way).settings == {"training.loss": "chunked"}


def test_half_of_the_checkpointing_comes_before_all_of_it() -> None:
    way = given_way("llama-248m", "zero.stage=3", "training.activation_checkpointing=none", micro_batch_size=1)
    assert advice_for(way).settings == {"training.activation_checkpointing": "selective"}


def test_more_gpus_come_before_offload_and_may_be_left_out() -> None:
    way = given_way("llama-7b", "training.activation_checkpointing=full")
    more = advice_for(way, 0.4)
    assert more.settings == {}
    assert more.world_size is not None
    assert way.run.global_batch_size % more.world_size == 0
    without = advice_for(way, 0.4, more_ranks=False)
    assert without.settings == {"zero.offload_optimizer": "cpu"}
    assert without.world_size is None


def test_offload_that_the_host_cannot_hold_is_no_advice() -> None:
    way = given_way("llama-7b", "training.activation_checkpointing=full")
    gpu = replace(just_too_small_for(way, 0.4), host_memory_bytes=64 * GIB)
    advice = advise(way, gpu, predict, more_ranks=False)
    assert not advice.fits
    assert advice.estimate.host_bytes <= 64 * GIB


def test_two_changes_are_made_where_one_does_not_do() -> None:
    way = given_way("gpt2-124m", "zero.stage=1", world_size=8, micro_batch_size=64)
    assert set(advice_for(way, 0.2, more_ranks=False).settings) == {"batch.micro_batch_size"}
    both = advice_for(way, 0.12, more_ranks=False)
    assert both.fits
    assert set(both.settings) == {"batch.micro_batch_size", "zero.stage"}


def test_of_many_changes_none_is_needless() -> None:
    way = given_way("gpt2-124m", "zero.stage=1", "training.loss=plain", world_size=8, micro_batch_size=64)
    least_bytes = advice_for(way, 0.001, more_ranks=False).estimate.peak.total_bytes
    gpu = replace(gpu_named("a100-80gb"), memory_bytes=round(1.03 * least_bytes / FITTING_SHARE))
    advice = advise(way, gpu, predict, more_ranks=False)
    assert advice.fits
    assert len(advice.settings) >= 4
    run, zero = advice.changed.run, advice.changed.run.zero
    lesser = {
        "training.loss": replace(run, loss="plain"),
        "training.activation_checkpointing": replace(run, activation_checkpointing="none"),
        "zero.offload_param": replace(run, zero=replace(zero, offload_param="none")),
        "zero.offload_optimizer": replace(run, zero=replace(zero, offload_optimizer="none")),
    }
    for name in lesser.keys() & advice.settings.keys():
        assert not predict(replace(advice.changed, run=lesser[name])).fits(gpu.memory_bytes), name


def test_where_nothing_fits_the_nearest_miss_is_told() -> None:
    way = given_way("llama-7b")
    advice = advise(way, replace(gpu_named("t4"), memory_bytes=2 * GIB), predict)
    assert not advice.fits
    assert advice.estimate.peak.total_bytes < predict(way).peak.total_bytes
    assert advice.settings


def test_a_run_that_nothing_can_change_is_its_own_nearest_miss() -> None:
    zero = "zero={stage: 3, offload_optimizer: cpu, offload_param: cpu}"
    way = given_way("quickstart", zero, "training.activation_checkpointing=full", "batch.micro_batch_size=1")
    advice = advise(way, replace(gpu_named("t4"), memory_bytes=1), predict, more_ranks=False)
    assert not advice.fits
    assert advice.settings == {}


def test_nothing_fits_a_gpu_without_arithmetic_in_the_precision() -> None:
    huge = replace(gpu_named("v100"), memory_bytes=10**13)
    assert not advise(given_way("1b", micro_batch_size=8), huge, predict).fits
    assert advise(given_way("1b", "training.precision=fp16", micro_batch_size=8), huge, predict).fits


OVERRIDES = {
    "an own reduce bucket": ["zero={stage: 2, reduce_bucket_elements: 100_000_000}"],
    "an own gather bucket": ["zero={stage: 2, gather_bucket_elements: 100_000_000}"],
    "overlap": ["zero={stage: 2, overlap_comm: true}"],
    "no overlap": ["zero={stage: 1, overlap_comm: false}"],
    "sums in bf16": ["training.gradient_accumulation_precision=bf16", "zero.stage=1"],
    "offload to nvme": ["zero={stage: 3, offload_optimizer: nvme, offload_param: cpu, nvme_path: /tmp}"],
}


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
@pytest.mark.parametrize("stage", range(4))
def test_a_spec_with_the_settings_is_the_run_that_was_advised(overrides: list[str], stage: int) -> None:
    written = given_way("1b", *overrides, world_size=2, micro_batch_size=8)
    way = replace(written, run=written.run.at_stage(stage))
    for share in (0.999, 0.6, 0.3):
        changed = advice_for(way, share, more_ranks=False).changed
        typed = [f"{name}={value}" for name, value in changed_settings(written, changed).items()]
        spec = load_spec("1b", [*overrides, *typed])
        assert replace(changed.run, micro_batch_size=changed.micro_batch_size) == workload(spec)


def test_tuning_that_a_stage_drops_is_among_the_settings() -> None:
    way = given_way("1b", "zero={stage: 2, gather_bucket_elements: 100_000_000}", world_size=8, micro_batch_size=1)
    advice = advice_for(way)
    assert advice.settings == {"zero.stage": 3, "zero.gather_bucket_elements": "null"}


@given(st.sampled_from(sorted(PRESETS)), st.integers(0, 3), st.sampled_from([1, 2, 8]), st.floats(0.15, 0.99))
@settings(max_examples=40, deadline=None)
def test_what_is_advised_fits_and_keeps_the_batch(preset: str, stage: int, world_size: int, share: float) -> None:
    run = PRESETS[preset].at_stage(stage)
    way = Way(run, world_size, run.micro_batch_size or 1)
    gpu = just_too_small_for(way, share)
    advice = advise(way, gpu, predict)
    assert advice.estimate == predict(advice.changed)
    assert advice.fits == advice.estimate.fits_on(gpu)
    if run.global_batch_size % (way.micro_batch_size * world_size) == 0:
        changed = advice.changed
        assert run.global_batch_size % (changed.micro_batch_size * changed.world_size) == 0
        assert changed.run.global_batch_size == run.global_batch_size


@pytest.mark.parametrize("preset", ["gpt2-1558m", "llama-7b"])
def test_a_smaller_gpu_never_needs_fewer_changes(preset: str) -> None:
    way = given_way(preset, "zero.stage=0", world_size=8)
    found = [advice_for(way, share, more_ranks=False) for share in (0.99, 0.8, 0.6, 0.4, 0.3, 0.2)]
    counts = [len(advice.settings) for advice in found if advice.fits]
    assert all(fewer <= more for fewer, more in pairwise(counts))
    assert counts
