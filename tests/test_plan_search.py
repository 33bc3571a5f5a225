"""The choices that dsllm makes: micro-batch sizes, ways to run, GPUs to rent; and shapes that it assumes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllm.cli.plan_report import settings_of
from dsllm.errors import UserError
from dsllm.plan import advice
from dsllm.plan import workload as workloads
from dsllm.plan.cost import Machine
from dsllm.plan.hardware import Gpu, gpu_named, gpus
from dsllm.plan.memory import FITTING_SHARE, estimate_memory
from dsllm.plan.search import (
    RESOLUTION,
    Conditions,
    Fit,
    Limits,
    Misfit,
    as_given,
    best_on_each,
    choose_micro_batch,
    search,
    variants,
    within_limits,
)
from dsllm.plan.typical import typical_workload
from dsllm.plan.workload import Workload, workload
from dsllm.spec.load import load_spec, preset_names

GIB = 2**30
PRESETS = {name: workload(load_spec(name)) for name in preset_names()}
MACHINES = st.builds(
    lambda gpu, world_size: Machine.of(gpu, world_size), st.sampled_from(gpus()), st.sampled_from([1, 2, 4, 8, 16])
)


def test_the_largest_micro_batch_that_fits_is_chosen() -> None:
    run = PRESETS["gpt2-124m"]
    chosen = choose_micro_batch(run, 8, 40 * GIB)
    assert 64 % chosen == 0
    assert estimate_memory(run, 8, chosen).fits(40 * GIB)
    assert chosen == 64 or not estimate_memory(run, 8, 2 * chosen).fits(40 * GIB)


def test_more_memory_never_chooses_less() -> None:
    sizes = [choose_micro_batch(PRESETS["llama-1b"], 8, gib * GIB) for gib in (16, 24, 40, 80, 141)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_one_is_tried_where_nothing_is_predicted_to_fit() -> None:
    assert choose_micro_batch(PRESETS["llama-7b"], 1, 8 * GIB) == 1


def test_a_number_in_the_spec_is_kept() -> None:
    assert choose_micro_batch(PRESETS["1b"], 8, 8 * GIB) == 8


def test_a_batch_that_does_not_divide_is_refused_for_auto_too() -> None:
    with pytest.raises(UserError, match="given 512; micro_batch_size 1 on 3 ranks takes 3 sequences"):
        choose_micro_batch(PRESETS["gpt2-124m"], 3, 40 * GIB)


@pytest.mark.parametrize("stage", range(4))
def test_a_run_at_another_stage_keeps_only_what_the_stage_has(stage: int) -> None:
    overrides = ["zero.stage=3", "zero.offload_optimizer=nvme", "zero.offload_param=cpu", "zero.nvme_path=/nvme"]
    zero = workload(load_spec("1b", overrides)).at_stage(stage).zero
    assert zero.stage == stage
    assert (zero.offload_optimizer, zero.offload_param) == (("nvme", "cpu") if stage == 3 else ("none", "none"))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("overlap", ["true", "false"])
def test_a_run_at_another_stage_overlaps_as_it_was_told(stage: int, overlap: str) -> None:
    given_stage = 3 if stage == 2 else 2
    run = workload(load_spec("1b", [f"zero.stage={given_stage}", f"zero.overlap_comm={overlap}"]))
    # nothing overlaps in BF16_Optimizer, and a spec may not ask for it
    expected = "auto" if (stage, overlap) == (1, "true") else overlap == "true"
    assert run.at_stage(stage).zero.overlap_comm == expected
    assert run.at_stage(0).zero.overlap_comm == "auto"


def test_the_reduction_is_tuned_at_stage_1_only_where_deepspeed_reads_it() -> None:
    run = workload(load_spec("1b", ["zero.reduce_bucket_elements=1000"]))
    assert run.at_stage(1).zero.reduce_bucket_elements is None
    assert replace(run, precision="fp16").at_stage(1).zero.reduce_bucket_elements == 1000
    tuned = [one.zero for one in variants(run, gpu_named("h100")) if one.zero.stage == 1]
    assert {zero.offload_optimizer for zero in tuned if zero.reduce_bucket_elements == 1000} == {"cpu"}
    assert {zero.offload_optimizer for zero in tuned if zero.reduce_bucket_elements is None} == {"none"}


def test_checkpointings_are_listed_once() -> None:
    assert advice.CHECKPOINTINGS is workloads.CHECKPOINTINGS


def test_a_runtime_that_was_measured_leaves_room_for_less() -> None:
    run = PRESETS["llama-1b"]
    assert choose_micro_batch(run, 8, 24 * GIB, runtime_bytes=12 * GIB) < choose_micro_batch(run, 8, 24 * GIB)
    assert choose_micro_batch(run, 8, 24 * GIB, runtime_bytes=GIB) == choose_micro_batch(run, 8, 24 * GIB)
    assert choose_micro_batch(run, 8, 24 * GIB, reserved_ratio=2.0) < choose_micro_batch(run, 8, 24 * GIB)


@given(st.integers(10**7, 10**11))
@settings(max_examples=60, deadline=None)
def test_a_typical_shape_has_about_the_parameters(parameters: int) -> None:
    shape = typical_workload(parameters).shape
    assert abs(shape.parameters - parameters) / parameters < 0.15


# --- one machine ------------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(PRESETS)), MACHINES)
@settings(max_examples=40, deadline=None)
def test_what_is_ranked_fits_and_is_sorted_and_nothing_is_lost(preset: str, machine: Machine) -> None:
    run = PRESETS[preset]
    found = search(run, machine)
    rates = [fit.cost.tokens_per_second for fit in found.fits]
    assert rates == sorted(rates, reverse=True)
    for fit in found.fits:
        assert estimate_memory(fit.run, machine.world_size, fit.micro_batch_size).fits(machine.gpu.memory_bytes)
        assert fit.accumulation_steps * fit.micro_batch_size * machine.world_size == run.global_batch_size
    for misfit in found.misfits:
        in_hardware = run.precision in machine.gpu.flops
        assert (misfit.short_bytes > 0) == in_hardware
    assert len(found.fits) + len(found.misfits) == len(list(variants(run, machine.gpu)))


@given(st.sampled_from(sorted(PRESETS)), MACHINES)
@settings(max_examples=40, deadline=None)
def test_each_way_has_the_micro_batch_that_auto_would_choose(preset: str, machine: Machine) -> None:
    for fit in search(PRESETS[preset], machine).fits:
        automatic = replace(fit.run, micro_batch_size=None)
        assert fit.micro_batch_size == choose_micro_batch(automatic, machine.world_size, machine.gpu.memory_bytes)


@given(st.sampled_from(sorted(PRESETS)), MACHINES)
@settings(max_examples=40, deadline=None)
def test_the_recommendation_is_as_fast_as_the_fastest(preset: str, machine: Machine) -> None:
    found = search(PRESETS[preset], machine)
    given_way = as_given(PRESETS[preset], machine)
    chosen = found.recommended(given_way)
    assert (chosen is None) == (not found.fits)
    if chosen is not None:
        fastest = found.fits[0].cost.tokens_per_second
        assert chosen.cost.tokens_per_second >= (1 - RESOLUTION) * fastest


def test_a_plain_way_is_recommended_over_one_that_is_not_surely_faster() -> None:
    chosen = search(
        replace(PRESETS["gpt2-124m"], micro_batch_size=None), Machine.of(gpu_named("a100-80gb"), 8)
    ).recommended()
    assert chosen is not None
    assert (chosen.run.zero.stage, chosen.run.zero.offload_optimizer) == (1, "none")
    assert chosen.run.activation_checkpointing == "none"


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        *((preset, []) for preset in sorted(PRESETS)),
        ("1b", ["zero.reduce_bucket_elements=100000000"]),
        ("1b", ["zero.overlap_comm=true", "zero.gather_bucket_elements=1000"]),
        ("1b", ["zero.stage=1", "zero.offload_optimizer=cpu", "zero.overlap_comm=true"]),
        ("1b", ["zero.stage=3", "zero.overlap_comm=false", "zero.max_live_elements=100000000"]),
        ("gpt2-124m", ["training.gradient_accumulation_precision=fp32"]),
        ("gpt2-124m", ["training.gradient_accumulation_precision=bf16", "zero.reduce_bucket_elements=1000"]),
        ("gpt2-124m", ["training.precision=fp16", "training.gradient_accumulation_precision=fp32"]),
        ("gpt2-124m", ["training.precision=fp32", "zero.stage=0", "zero.overlap_comm=false"]),
    ],
)
def test_a_recommendation_is_a_valid_spec_that_plans_the_same(preset: str, overrides: list[str]) -> None:
    machine = Machine.of(gpu_named("a100-40gb"), 8)
    run = workload(load_spec(preset, overrides))
    found = search(run, machine)
    assert found.fits
    for fit in found.fits:
        changes = [f"{name}={value}" for name, value in settings_of(run, fit).items()]
        again = as_given(workload(load_spec(preset, [*overrides, *changes])), machine)
        assert isinstance(again, Fit)
        assert again.run.zero == fit.run.zero
        assert (again.cost, again.memory, again.micro_batch_size) == (fit.cost, fit.memory, fit.micro_batch_size)


def test_settings_that_the_recommended_way_has_not_are_taken_back() -> None:
    overrides = [
        "zero.stage=3",
        "zero.max_live_elements=100000000",
        "zero.offload_optimizer=nvme",
        "zero.nvme_path=/nvme",
    ]
    run = workload(load_spec("1b", overrides))
    chosen = search(run, Machine.of(gpu_named("a100-80gb"), 8)).recommended()
    assert chosen is not None
    changes = settings_of(run, chosen)
    assert (changes["zero.max_live_elements"], changes["zero.nvme_path"]) == ("null", "null")
    again = workload(load_spec("1b", [*overrides, *(f"{name}={value}" for name, value in changes.items())]))
    assert again.zero == chosen.run.zero


def test_the_runs_own_choices_are_kept_as_they_are() -> None:
    own = as_given(PRESETS["1b"], Machine.of(gpu_named("a100-40gb"), 8))
    assert isinstance(own, Fit)
    assert (own.run, own.micro_batch_size, own.accumulation_steps) == (PRESETS["1b"], 8, 8)


def test_a_micro_batch_that_does_not_divide_is_a_reason() -> None:
    own = as_given(replace(PRESETS["1b"], micro_batch_size=24), Machine.of(gpu_named("a100-40gb"), 8))
    assert isinstance(own, Misfit)
    assert own.reason == "micro-batch 24 does not divide a rank's 64 sequences"


def test_what_does_not_fit_says_why_and_by_how_much() -> None:
    machine = Machine.of(gpu_named("t4"), 1)
    run = replace(PRESETS["llama-1b"], precision="fp16")
    misfit = search(run, machine).misfits[-1]
    needed = estimate_memory(misfit.run, 1, 1).peak.total_bytes
    assert misfit.short_bytes == needed - int(FITTING_SHARE * machine.gpu.memory_bytes)
    assert f"{needed / GIB:.2f} GiB at micro-batch 1" in misfit.reason
    assert misfit.reason.endswith(f"{misfit.short_bytes / GIB:.2f} GiB more than fits")


def test_a_precision_that_the_gpu_lacks_is_the_reason() -> None:
    found = search(PRESETS["gpt2-124m"], Machine.of(gpu_named("v100"), 8))
    assert found.fits == ()
    assert {misfit.reason for misfit in found.misfits} == {"bf16 is not in the hardware of v100-32gb"}


def test_offloading_needs_room_on_the_host() -> None:
    poor: Gpu = replace(gpu_named("a100-40gb"), host_memory_bytes=64 * GIB)
    offloaded = [one for one in search(PRESETS["llama-7b"], Machine.of(poor, 8)).misfits if "host memory" in one.reason]
    assert offloaded
    assert all(misfit.run.zero.offload_optimizer == "cpu" for misfit in offloaded)
    assert all(misfit.reason.endswith("more than it has to spare") for misfit in offloaded)


def test_more_host_memory_never_fits_less() -> None:
    gpu = gpu_named("a100-40gb")
    fitting = [
        len(search(PRESETS["llama-7b"], Machine.of(replace(gpu, host_memory_bytes=gib * GIB), 8)).fits)
        for gib in (32, 128, 512, 2048)
    ]
    assert fitting == sorted(fitting)


def test_a_cpu_offloads_to_no_host() -> None:
    assert {run.zero.offload_optimizer for run in variants(PRESETS["quickstart"], gpu_named("cpu"))} == {"none"}


# --- several machines -------------------------------------------------------------------------------------------------


def fits_on(run: Workload, names: list[str], counts: list[int]) -> list[Fit]:
    machines = [Machine.of(gpu_named(name), count) for name in names for count in counts]
    return [one for one in best_on_each(run, machines, Conditions()) if isinstance(one, Fit)]


def test_ranks_that_do_not_divide_the_batch_are_a_reason_and_no_end() -> None:
    machines = [Machine.of(gpu_named("h100"), count) for count in (8, 3)]
    found = best_on_each(PRESETS["gpt2-124m"], machines, Conditions())
    assert isinstance(found[0], Fit)
    assert isinstance(found[1], Misfit)
    assert found[1].reason == "512 sequences do not divide over 3 ranks"


def test_a_limit_between_the_recommended_and_the_fastest_way_is_kept_by_the_fastest() -> None:
    run, machine = PRESETS["gpt2-124m"], Machine.of(gpu_named("l4"), 8)
    plan = search(run, machine)
    plainest, fastest = plan.recommended(), plan.fits[0]
    assert plainest is not None
    assert plainest.cost.run_seconds > fastest.cost.run_seconds
    between = Limits(deadline_hours=(plainest.cost.hours + fastest.cost.hours) / 2)
    assert within_limits(best_on_each(run, [machine], Conditions(), between), between) == [fastest]
    enough = Limits(deadline_hours=plainest.cost.hours)
    assert within_limits(best_on_each(run, [machine], Conditions(), enough), enough) == [plainest]
    dollars = plainest.cost.dollars, fastest.cost.dollars
    assert best_on_each(run, [machine], Conditions(), Limits(budget_dollars=sum(dollars) / 2)) == [fastest]


def test_a_narrow_miss_is_told_with_enough_digits() -> None:
    fits = fits_on(PRESETS["gpt2-124m"], ["a100-40gb"], [8])
    hours = fits[0].cost.hours
    with pytest.raises(UserError, match=rf" with {hours:.4f} hours and .*, 0\.0032 hours over the deadline;"):
        within_limits(fits, Limits(deadline_hours=hours - 0.0032))
    with pytest.raises(UserError, match=r", \$0\.00050 over the budget;"):
        within_limits(fits, Limits(budget_dollars=fits[0].cost.dollars - 0.0005))


def test_limits_where_nothing_fits_at_all_say_so() -> None:
    with pytest.raises(UserError, match=r"^plan: given --deadline-hours 3; no such GPUs hold the run; give others, or"):
        within_limits([], Limits(deadline_hours=3.0))


def test_a_deadline_is_kept_at_the_least_price() -> None:
    fits = fits_on(PRESETS["gpt2-124m"], ["a100-40gb", "h100"], [1, 2, 4, 8, 16, 32])
    kept = within_limits(fits, Limits(deadline_hours=3.0))
    assert all(fit.cost.hours <= 3.0 for fit in kept)
    assert [fit.cost.dollars for fit in kept] == sorted(fit.cost.dollars for fit in kept)


def test_a_budget_is_kept_in_the_least_time() -> None:
    fits = fits_on(PRESETS["gpt2-124m"], ["a100-40gb", "h100"], [1, 2, 4, 8, 16, 32])
    kept = within_limits(fits, Limits(budget_dollars=50.0))
    assert all(fit.cost.dollars <= 50 for fit in kept)
    assert [fit.cost.run_seconds for fit in kept] == sorted(fit.cost.run_seconds for fit in kept)


def test_a_budget_that_nothing_fits_names_what_comes_closest_and_by_how_much() -> None:
    fits = fits_on(PRESETS["gpt2-124m"], ["a100-40gb"], [8])
    dollars = fits[0].cost.dollars
    assert dollars is not None
    message = (
        rf"^plan: given --budget-dollars 1, which nothing keeps; closest is 8 x a100-40gb with .* hours and "
        rf"\${dollars:,.2f}, \${dollars - 1:,.2f} over the budget; raise the limit, or train on fewer tokens$"
    )
    with pytest.raises(UserError, match=message):
        within_limits(fits, Limits(budget_dollars=1.0))


def test_a_deadline_that_nothing_keeps_says_by_how_many_hours() -> None:
    fits = fits_on(PRESETS["gpt2-124m"], ["a100-40gb"], [1, 8])
    over = min(fit.cost.hours for fit in fits) - 0.01
    with pytest.raises(UserError, match=f"closest is 8 x a100-40gb .*, {over:,.1f} hours over the deadline;"):
        within_limits(fits, Limits(1000.0, 0.01))


def test_a_device_without_a_price_keeps_no_budget() -> None:
    fits = fits_on(PRESETS["gpt2-124m"], ["a100-40gb"], [8])
    unpriced = [replace(fit, cost=replace(fit.cost, dollars=None)) for fit in fits]
    with pytest.raises(UserError, match="nothing that fits has a price; give other GPUs, or --price-per-hour"):
        within_limits(unpriced, Limits(budget_dollars=100.0))
    assert within_limits(unpriced, Limits(deadline_hours=1000.0)) == unpriced
