"""Step time, hours and dollars: hand arithmetic, and what must hold for any run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllm.errors import UserError
from dsllm.plan.cost import (
    ASSUMPTIONS,
    Machine,
    checkpoint_bytes,
    communication_seconds,
    compute_optimal_tokens,
    petaflop_s_days,
    price_per_hour,
    run_cost,
    step_time,
    work_seconds,
)
from dsllm.plan.hardware import Gpu, catalogue, gpu_named
from dsllm.plan.known_runs import shape
from dsllm.plan.pace import calibrate, measured_step_seconds
from dsllm.plan.traffic import communication, host_traffic
from dsllm.plan.typical import typical_run
from dsllm.plan.work import Work, matmul_parameters, micro_step_work, optimizer_work
from dsllm.plan.workload import Workload, ZeroSettings, workload
from dsllm.spec.load import load_spec

SMALL = Workload(
    shape=shape("gpt2", 2, 64, 2, 128, positions=32),
    sequence_length=32,
    global_batch_size=16,
    micro_batch_size=None,
    train_steps=100,
    loss="plain",
    zero=ZeroSettings(stage=1),
)
"""Two blocks of 64: 12 x 64 x 64 = 49,152 parameters in matrices each."""

RUNS = st.builds(
    lambda family, layers, width, heads, sequence, stage, checkpointing, precision, loss, attention: Workload(
        shape=shape(family, layers, 64 * width * heads, heads, 1000, positions=sequence),
        sequence_length=sequence,
        global_batch_size=64,
        micro_batch_size=None,
        train_steps=10,
        precision=precision,
        activation_checkpointing=checkpointing,
        loss=loss,
        attention=attention,
    ).at_stage(stage),
    st.sampled_from(["gpt2", "llama"]),
    st.integers(1, 48),
    st.integers(1, 4),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([128, 1024, 4096]),
    st.integers(0, 3),
    st.sampled_from(["none", "selective", "full"]),
    st.sampled_from(["bf16", "fp16", "fp32"]),
    st.sampled_from(["chunked", "fused", "plain"]),
    st.sampled_from(["sdpa", "eager"]),
)
GPUS = st.sampled_from([gpu for gpu in catalogue() if gpu.has_bf16])
WORLDS = st.sampled_from([1, 2, 8, 16, 64])


def seconds(run: Workload, gpu: Gpu, world_size: int, micro: int = 1) -> float:
    return step_time(run, Machine.of(gpu, world_size), micro).total_seconds


# --- what is counted --------------------------------------------------------------------------------------------------


def test_matrices_of_a_block_are_those_of_attention_and_feed_forward() -> None:
    assert matmul_parameters(SMALL.shape) == 12 * 64**2
    grouped = shape("llama", 1, 64, 4, 128, key_value_heads=2, intermediate_size=128)
    assert matmul_parameters(grouped) == 2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 128


def test_arithmetic_is_six_flop_a_parameter_and_token_and_the_projection() -> None:
    work = micro_step_work(SMALL, 4, "eager")
    tokens = 4 * 32
    assert work.matmul_flops == 6 * tokens * (2 * 12 * 64**2 + 128 * 64)
    # forward 2 products of s x h, halved by the mask; backward 5
    assert work.attention_flops == tokens * 2 * 3.5 * 2 * 32 * 64


def test_checkpointing_repeats_the_forward_of_the_blocks() -> None:
    plain = micro_step_work(SMALL, 4, "eager").matmul_flops
    half = micro_step_work(replace(SMALL, activation_checkpointing="selective"), 4, "eager").matmul_flops
    full = micro_step_work(replace(SMALL, activation_checkpointing="full"), 4, "eager").matmul_flops
    forward_of_a_block = 2 * 4 * 32 * 12 * 64**2
    assert (half - plain, full - plain) == (forward_of_a_block, 2 * forward_of_a_block)


def test_plain_attention_computes_the_masked_half_and_moves_its_rows() -> None:
    fused, plain = (micro_step_work(replace(SMALL, attention=kind), 4, "eager") for kind in ("sdpa", "eager"))
    assert plain.attention_flops == fused.attention_flops * 6 / 3.5
    assert plain.moved_bytes - fused.moved_bytes == 2 * 4 * 32 * 40 * 2 * 32  # 40 bytes a score, 2 heads


def test_fused_kernels_move_less_and_compute_the_same() -> None:
    eager, fused = micro_step_work(SMALL, 4, "eager"), micro_step_work(SMALL, 4, "fused")
    assert fused.matmul_flops == eager.matmul_flops
    assert fused.moved_bytes < eager.moved_bytes
    assert fused.host_seconds < eager.host_seconds


def test_the_optimizer_moves_fifty_bytes_for_each_parameter_of_a_partition() -> None:
    parameters = SMALL.shape.allocated_parameters
    assert optimizer_work(SMALL, 4).moved_bytes == 50 * parameters / 4
    assert optimizer_work(replace(SMALL, precision="fp32").at_stage(0), 4).moved_bytes == 50 * parameters
    offloaded = replace(SMALL, zero=replace(SMALL.zero, offload_optimizer="cpu"))
    assert optimizer_work(offloaded, 4).moved_bytes == 0


def test_the_flat_optimizer_of_stage_0_moves_gradients_once_more_and_steps_everything() -> None:
    # largest and smallest 16-bit gradient, cast, put in a row, norm, clipped, Adam, the weight
    each = 2 * 2 + (2 + 4) + (4 + 4) + 4 + (4 + 4) + 4 * (4 + 3) + (4 + 2)
    for precision in ("bf16", "fp16"):
        run = replace(SMALL, precision=precision).at_stage(0)
        assert optimizer_work(run, 4).moved_bytes == each * SMALL.shape.allocated_parameters


def test_seconds_are_work_over_what_the_hardware_sustains() -> None:
    gpu = gpu_named("a100-80gb")
    arithmetic, memory = work_seconds(Work(matmul_flops=312e12, moved_bytes=2.039e12), SMALL, gpu)
    assert arithmetic == pytest.approx(1 / (0.869 * ASSUMPTIONS.matmul_share))
    assert memory == pytest.approx(1 / ASSUMPTIONS.memory_share)


def test_fp32_products_run_at_the_peak_of_tf32_where_the_spec_allows_it_and_the_gpu_has_it() -> None:
    a100, t4 = gpu_named("a100-80gb"), gpu_named("t4-16gb")
    runs = [
        workload(load_spec("quickstart", [f"training.precision={precision}", f"training.tf32={tf32}"]))
        for precision in ("fp32", "bf16")
        for tf32 in ("true", "false")
    ]
    rounded, exact, half, half_without = (work_seconds(Work(matmul_flops=1e12), run, a100)[0] for run in runs)
    assert exact == pytest.approx(156 / 19.5 * rounded)
    assert half == half_without == pytest.approx(rounded / 2)
    assert work_seconds(Work(matmul_flops=1e12), runs[0], t4) == work_seconds(Work(matmul_flops=1e12), runs[1], t4)
    machine = Machine.of(a100, 1)
    of_tf32, of_fp32 = (run_cost(run, machine, step_time(run, machine, 1)) for run in runs[:2])
    shares = [cost.model_flops_utilization / cost.tokens_per_second for cost in (of_tf32, of_fp32)]
    assert shares[1] == pytest.approx(8 * shares[0]), "each is of its own peak"


# --- what is communicated ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "gradients", "parameters"),
    # an all-reduce is twice the weights; from stage 2 on in each of 4 micro-steps; stage 3 gathers twice in each
    [(0, 2, 0), (1, 2, 1), (2, 2 * 4, 1), (3, 4, 2 * 4)],
)
def test_each_stage_moves_what_deepspeed_moves(stage: int, gradients: int, parameters: int) -> None:
    weights = 2 * SMALL.shape.allocated_parameters
    traffic = communication(SMALL.at_stage(stage), 8, 4)
    assert (traffic.gradients_bytes, traffic.parameters_bytes) == (gradients * weights, parameters * weights)


def test_one_rank_talks_to_nobody() -> None:
    assert communication(SMALL, 1, 4).total_bytes == 0
    assert communication_seconds(SMALL, Machine.of(gpu_named("h100"), 1), 4) == (0.0, 0.0)


def test_a_ring_in_a_node_takes_its_share_of_the_bytes_over_the_link() -> None:
    run = replace(SMALL, shape=shape("gpt2", 12, 1024, 16, 50257)).at_stage(0)
    gpu = gpu_named("a100-80gb")
    gradients, parameters = communication_seconds(run, Machine.of(gpu, 8), 1)
    weights = 2 * run.shape.allocated_parameters
    buckets = math.ceil(run.shape.allocated_parameters / 50e6)
    assert gradients == pytest.approx(2 * weights * 7 / 8 / (0.75 * 300e9) + 3 * buckets * 1e-5)
    assert parameters == 0


def test_nodes_share_their_adapters() -> None:
    run = replace(SMALL, shape=shape("gpt2", 12, 1024, 16, 50257)).at_stage(0)
    slow = replace(gpu_named("a100-80gb"), network_bytes_per_second=1e9)
    gradients, _ = communication_seconds(run, Machine.of(slow, 16), 1)
    assert gradients == pytest.approx(2 * 2 * run.shape.allocated_parameters / 2 / (8 * 0.8 * 1e9), rel=0.01)


def test_offloading_moves_gradients_in_every_micro_step_and_weights_once() -> None:
    parameters = SMALL.shape.allocated_parameters
    offloaded = replace(SMALL.at_stage(2), zero=ZeroSettings(stage=2, offload_optimizer="cpu"))
    traffic = host_traffic(offloaded, 4, 8)
    assert traffic.pcie_bytes == (2 * 8 + 2) * parameters / 4
    assert traffic.stepped_parameters == parameters / 4
    assert traffic.nvme_bytes == 0
    both = replace(SMALL.at_stage(3), zero=ZeroSettings(stage=3, offload_optimizer="nvme", offload_param="cpu"))
    traffic = host_traffic(both, 4, 8)
    assert traffic.pcie_bytes == (4 * 8 + 2 + 2 * 8 * 2) * parameters / 4
    assert traffic.nvme_bytes == 2 * 12 * parameters / 4


# --- what holds for any run -------------------------------------------------------------------------------------------


@given(RUNS, GPUS, WORLDS)
@settings(max_examples=80, deadline=None)
def test_more_arithmetic_never_takes_less_time(run: Workload, gpu: Gpu, world_size: int) -> None:
    before = seconds(run, gpu, world_size) * (1 - 1e-12)
    deeper = replace(run, shape=replace(run.shape, num_layers=run.shape.num_layers + 1))
    assert seconds(deeper, gpu, world_size) >= before
    wider = replace(run, shape=replace(run.shape, intermediate_size=2 * run.shape.intermediate_size))
    assert seconds(wider, gpu, world_size) >= before
    assert seconds(replace(run, global_batch_size=128), gpu, world_size) >= before
    assert seconds(replace(run, activation_checkpointing="full"), gpu, world_size) >= before


@given(RUNS, GPUS, WORLDS, st.floats(1.0, 100.0))
@settings(max_examples=80, deadline=None)
def test_faster_hardware_is_never_slower(run: Workload, gpu: Gpu, world_size: int, factor: float) -> None:
    before = seconds(run, gpu, world_size)
    for figure in (
        "link_bytes_per_second",
        "network_bytes_per_second",
        "pcie_bytes_per_second",
        "memory_bytes_per_second",
        "host_memory_bytes_per_second",
    ):
        faster = replace(gpu, **{figure: factor * getattr(gpu, figure)})
        assert seconds(run, faster, world_size) <= before * (1 + 1e-12), figure


@given(RUNS, GPUS, WORLDS)
@settings(max_examples=80, deadline=None)
def test_a_larger_micro_batch_never_takes_longer(run: Workload, gpu: Gpu, world_size: int) -> None:
    share = run.global_batch_size // world_size
    times = [seconds(run, gpu, world_size, micro) for micro in (1, 2, 4, 64) if share % micro == 0]
    assert times == sorted(times, reverse=True)


@given(RUNS, GPUS, WORLDS)
@settings(max_examples=80, deadline=None)
def test_nothing_exceeds_the_peak(run: Workload, gpu: Gpu, world_size: int) -> None:
    machine = Machine.of(gpu, world_size)
    cost = run_cost(run, machine, step_time(run, machine, 1))
    assert 0 < cost.model_flops_utilization < 1
    assert min(vars(cost.step).values()) >= 0


@given(RUNS, GPUS, WORLDS, st.floats(0.01, 1000), st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_dollars_scale_with_the_price_and_with_the_steps(
    run: Workload, gpu: Gpu, world_size: int, price: float, factor: int
) -> None:
    machine = Machine.of(gpu, world_size)
    step = step_time(run, machine, 1)
    once = run_cost(run, machine, step, price).dollars
    assert once == pytest.approx(price * machine.num_nodes * run.train_steps * step.total_seconds / 3600)
    assert run_cost(run, machine, step, factor * price).dollars == pytest.approx(factor * once)
    longer = replace(run, train_steps=factor * run.train_steps)
    assert run_cost(longer, machine, step, price).dollars == pytest.approx(factor * once)


@given(RUNS, GPUS, WORLDS)
@settings(max_examples=60, deadline=None)
def test_offloading_never_saves_time_where_the_gpu_would_not_wait(run: Workload, gpu: Gpu, world_size: int) -> None:
    staged = run.at_stage(3)
    offloaded = replace(staged, zero=replace(staged.zero, offload_optimizer="cpu", offload_param="cpu"))
    without = step_time(staged, Machine.of(gpu, world_size), 1)
    assert step_time(offloaded, Machine.of(gpu, world_size), 1).offload_seconds > without.offload_seconds == 0


# --- what a run comes to ----------------------------------------------------------------------------------------------


def test_a_machine_is_as_many_nodes_as_its_ranks_need() -> None:
    gpu = gpu_named("a100-40gb")
    assert [Machine.of(gpu, ranks).num_nodes for ranks in (1, 8, 9, 64)] == [1, 1, 2, 8]
    assert Machine.of(gpu, 8, gpus_per_node=4).num_nodes == 2
    assert Machine.of(gpu, 2).ranks_per_node == 2


def test_the_price_is_that_of_whole_nodes_where_it_is_given() -> None:
    machine = Machine.of(gpu_named("a100-40gb"), 16)
    assert price_per_hour(machine) == 16 * 1.99
    assert price_per_hour(machine, 8.80) == 17.60
    assert price_per_hour(replace(machine, gpu=replace(machine.gpu, price_per_hour=None))) is None


def test_hours_hold_the_steps_and_a_third_of_a_step_for_each_batch_that_is_evaluated() -> None:
    machine = Machine.of(gpu_named("a100-40gb"), 1)
    step = step_time(SMALL, machine, 1)
    assert run_cost(SMALL, machine, step).run_seconds == pytest.approx(100 * step.total_seconds)
    assert run_cost(SMALL, machine, step, None, 30).run_seconds == pytest.approx(110 * step.total_seconds)


def test_a_petaflop_s_day_is_1e15_flop_a_second_for_a_day() -> None:
    run = workload(load_spec("gpt2-124m"))
    flops = run.tokens * (6 * 124_439_808 + 12 * 12 * 768 * 1024)
    assert petaflop_s_days(run) == pytest.approx(flops / 8.64e19)


def test_compute_optimal_is_twenty_tokens_a_parameter() -> None:
    assert compute_optimal_tokens(workload(load_spec("1b"))) == 20 * 1_065_758_400


@pytest.mark.parametrize(
    ("stage", "precision", "each"), [(2, "bf16", 14), (3, "bf16", 14), (0, "fp32", 12), (1, "fp32", 16)]
)
def test_a_checkpoint_holds_weights_master_and_moments(stage: int, precision: str, each: int) -> None:
    run = replace(SMALL, precision=precision).at_stage(stage)
    assert checkpoint_bytes(run) == each * run.shape.allocated_parameters


@pytest.mark.parametrize(("parameters", "sequences"), [(10**8, 512), (10**9, 1024), (7 * 10**9, 2048), (10**11, 4096)])
def test_a_typical_run_is_compute_optimal_in_batches_that_grow_with_it(parameters: int, sequences: int) -> None:
    run = typical_run(parameters)
    assert run.global_batch_size == sequences
    assert 0 <= run.tokens - compute_optimal_tokens(run) < run.tokens_per_step


# --- calibration ------------------------------------------------------------------------------------------------------


def records(*seconds: float) -> list[dict[str, float]]:
    return [{"step": number, "step_seconds": each} for number, each in enumerate(seconds, start=1)]


def test_the_median_leaves_out_the_warm_up_and_evaluations() -> None:
    steps = records(9, 9, 9, 9, 9, 1.0, 1.2, 50, 1.1)
    steps[7]["val_loss"] = 3.0
    assert measured_step_seconds(steps, "metrics.jsonl") == (1.1, 3)


def test_too_few_steps_to_measure_by_are_refused() -> None:
    with pytest.raises(UserError, match=r"^runs/x: 5 steps, none of them to measure by; .*; train 10 steps or more$"):
        measured_step_seconds(records(1, 1, 1, 1, 1), "runs/x")


@pytest.mark.parametrize("seconds", [None, 0, -1.0, "fast", True, float("nan"), float("inf")])
def test_a_step_that_was_not_timed_is_refused(seconds: object) -> None:
    steps = records(1, 1, 1, 1, 1, 1, 1)
    steps[6]["step_seconds"] = seconds
    with pytest.raises(UserError, match=r"^runs/x: step 7: step_seconds: given .*; a step takes time; remove"):
        measured_step_seconds(steps, "runs/x")
    del steps[6]["step_seconds"]
    with pytest.raises(UserError, match=r"^runs/x: step 7: step_seconds: given None; a step takes time"):
        measured_step_seconds(steps, "runs/x")


def test_a_run_is_not_compared_with_a_gpu_that_cannot_run_it() -> None:
    with pytest.raises(UserError, match="given a run in bf16 on t4-16gb, which has no such arithmetic by its figures;"):
        calibrate(SMALL, Machine.of(gpu_named("t4"), 8), 1, "eager", (0.5, 20))


def test_a_calibrated_prediction_of_the_same_run_is_what_was_measured() -> None:
    machine = Machine.of(gpu_named("a100-40gb"), 8)
    pace = calibrate(SMALL, machine, 1, "eager", (0.5, 20)).pace
    assert step_time(SMALL, machine, 1, pace=pace).total_seconds == pytest.approx(0.5)
    assert step_time(SMALL, machine, 2, pace=pace).total_seconds < 0.5
