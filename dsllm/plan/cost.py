"""How long a step takes on given devices, and what a run comes to: hours, dollars, arithmetic, disk.

A step is a sum of named terms, like the memory: matrix products at the rate that the hardware sustains, everything else
at the speed of its memory, communication that is not hidden, the optimizer, offloading. The assumptions are one set for
all devices and models (docs/planning.md says where each is from), and a measured run can take their place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsllm.plan.hardware import Gpu
from dsllm.plan.model_shape import flops_per_token
from dsllm.plan.muon import spared_bytes
from dsllm.plan.traffic import communication, host_traffic
from dsllm.plan.work import Kernels, Work, micro_step_work, optimizer_work
from dsllm.plan.workload import Workload

SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = 86400
TOKENS_PER_PARAMETER = 20
"""Of a compute-optimal run (Chinchilla, arXiv:2203.15556, table 3: 19.7 to 21.6 up to 10B parameters)."""

EVALUATION_SHARE = 1 / 3
"""Of the time of a training step, for as many sequences: forward alone."""


@dataclass(frozen=True)
class Assumptions:
    """Shares of the hardware's figures that training reaches. The first was fitted; the others are of parts."""

    matmul_share: float = 0.80
    """Of the best-shaped matrix product's rate: shapes as models have them, clocks under load. The one number that was
    fitted, to llm-foundry's tables on A100 (docs/planning.md)."""
    attention_share: float = 0.50
    """Of that rate in fused attention, forward and backward (FlashAttention-2, arXiv:2307.08691, figures 4 to 6)."""
    memory_share: float = 0.85
    """Of the memory's peak that a kernel which only moves bytes reaches: about what a copy does."""
    nvlink_share: float = 0.75
    """Of NVLink's peak in NCCL's collectives: 230 of 300 GB/s on eight A100."""
    pcie_share: float = 0.50
    """Of PCIe's peak where GPUs share it and pass through the host's memory."""
    network_share: float = 0.80
    """Of the adapters' peak."""
    overlap_share: float = 0.80
    """Of communication that hides behind arithmetic where DeepSpeed lets it."""
    host_copy_share: float = 0.80
    """Of PCIe's peak in a copy from or to pinned memory."""
    host_share: float = 0.70
    """Of the host memory's peak in CPUAdam."""
    collective_seconds: float = 1e-5
    """Latency of a collective, for each doubling of the ranks."""


ASSUMPTIONS = Assumptions()
CPU_ADAM_BYTES = 32
"""For each parameter: three fp32 numbers read and written, the gradient read, the weight written."""


@dataclass(frozen=True)
class Machine:
    """Ranks, one on each GPU, on nodes of `gpus_per_node`; fewer ranks than that are on one node."""

    gpu: Gpu
    world_size: int
    gpus_per_node: int

    @classmethod
    def of(cls, gpu: Gpu, world_size: int, gpus_per_node: int | None = None) -> Machine:
        return cls(gpu, world_size, gpus_per_node or gpu.gpus_per_node)

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.gpus_per_node)

    @property
    def ranks_per_node(self) -> int:
        return min(self.world_size, self.gpus_per_node)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on every rank, by what they go to."""

    matmul_seconds: float
    memory_seconds: float
    """Norms, activation functions, the loss, adding gradients up: bytes through the GPU's memory."""
    host_seconds: float
    """What Python, DeepSpeed's hooks and launches take longer than the GPU."""
    communication_seconds: float
    """What is not hidden behind arithmetic."""
    optimizer_seconds: float
    offload_seconds: float
    pace: float = 1.0
    """Measured over predicted, where a run has calibrated the prediction."""

    @property
    def total_seconds(self) -> float:
        return self.pace * (
            self.matmul_seconds
            + self.memory_seconds
            + self.host_seconds
            + self.communication_seconds
            + self.optimizer_seconds
            + self.offload_seconds
        )


def step_time(
    run: Workload,
    machine: Machine,
    micro_batch_size: int,
    kernels: Kernels = "eager",
    pace: float = 1.0,
    assumed: Assumptions = ASSUMPTIONS,
) -> StepTime:
    """The time of an optimizer step; `micro_batch_size` x ranks must divide the global batch."""
    accumulation_steps = run.global_batch_size // (micro_batch_size * machine.world_size)
    micro = micro_step_work(run, micro_batch_size, kernels)
    matmul, memory = work_seconds(micro, run, machine.gpu, assumed)
    waiting = max(0.0, micro.host_seconds - matmul - memory)
    passing = accumulation_steps * (matmul + memory + waiting)
    update = optimizer_work(run, machine.world_size)
    return StepTime(
        matmul_seconds=accumulation_steps * matmul,
        memory_seconds=accumulation_steps * memory,
        host_seconds=accumulation_steps * waiting,
        communication_seconds=_exposed_seconds(run, machine, accumulation_steps, passing, assumed),
        optimizer_seconds=max(update.host_seconds, sum(work_seconds(update, run, machine.gpu, assumed))),
        offload_seconds=_offload_seconds(run, machine, accumulation_steps, assumed),
        pace=pace,
    )


def work_seconds(work: Work, run: Workload, gpu: Gpu, assumed: Assumptions = ASSUMPTIONS) -> tuple[float, float]:
    """Seconds of arithmetic and of bytes moved. Raises KeyError for a precision that the GPU does not have."""
    rate = gpu.matmul_flops(run.precision, run.tf32) * gpu.matmul_share * assumed.matmul_share
    arithmetic = work.matmul_flops / rate + work.attention_flops / (rate * assumed.attention_share)
    return arithmetic, work.moved_bytes / (gpu.memory_bytes_per_second * assumed.memory_share)


def communication_seconds(
    run: Workload, machine: Machine, accumulation_steps: int, assumed: Assumptions = ASSUMPTIONS
) -> tuple[float, float]:
    """Seconds of the gradients' and of the parameters' collectives, hidden or not.

    Rings in a node and rings across nodes work at the same time, so that the slower decides. A node's boundary is
    crossed once by what all its ranks need, through all its adapters.
    """
    traffic = communication(run, machine.world_size, accumulation_steps)
    if machine.world_size == 1:
        return 0.0, 0.0
    share = assumed.nvlink_share if machine.gpu.link == "nvlink" else assumed.pcie_share
    ranks, nodes = machine.ranks_per_node, machine.num_nodes
    in_node = (ranks - 1) / ranks / (machine.gpu.link_bytes_per_second * share)
    adapters = ranks * machine.gpu.network_bytes_per_second * assumed.network_share
    per_byte = max(in_node, (nodes - 1) / nodes / adapters)
    latency = assumed.collective_seconds * math.log2(machine.world_size) * traffic.collectives
    gradients = traffic.gradients_bytes / traffic.total_bytes
    return (
        traffic.gradients_bytes * per_byte + gradients * latency,
        traffic.parameters_bytes * per_byte + (1 - gradients) * latency,
    )


def _exposed_seconds(
    run: Workload, machine: Machine, accumulation_steps: int, passing: float, assumed: Assumptions
) -> float:
    """What is left of communication beside forward and backward, which take `passing` seconds.

    Stage 3 fetches ahead; at stages 1 and 2 weights are gathered after the step, beside nothing.
    """
    gradients, parameters = communication_seconds(run, machine, accumulation_steps, assumed)
    hideable = (gradients if run.zero.overlaps else 0.0) + (parameters if run.zero.stage == 3 else 0.0)
    hidden = min(assumed.overlap_share * hideable, passing)
    return gradients + parameters - hidden


def _offload_seconds(run: Workload, machine: Machine, accumulation_steps: int, assumed: Assumptions) -> float:
    """Copies over PCIe, the host's optimizer step, NVMe: one after the other, and a node's ranks share its host."""
    traffic = host_traffic(run, machine.world_size, accumulation_steps)
    gpu, ranks = machine.gpu, machine.ranks_per_node
    stepping = CPU_ADAM_BYTES * traffic.stepped_parameters * ranks
    return (
        traffic.pcie_bytes / (gpu.pcie_bytes_per_second * assumed.host_copy_share)
        + stepping / (gpu.host_memory_bytes_per_second * assumed.host_share)
        + traffic.nvme_bytes * ranks / gpu.nvme_bytes_per_second
    )


@dataclass(frozen=True)
class Cost:
    """What a run comes to on a machine."""

    step: StepTime
    tokens_per_second: float
    model_flops_utilization: float
    """Model FLOP, nothing repeated, over the peak of the run's precision, or of TF32 where fp32 may round to it."""
    run_seconds: float
    dollars: float | None
    """None where the price is not known."""

    @property
    def hours(self) -> float:
        return self.run_seconds / SECONDS_PER_HOUR


def price_per_hour(machine: Machine, node_price: float | None = None) -> float | None:
    """Dollars an hour for all of a machine: `node_price` for each node, or the catalogue's for each GPU."""
    if node_price is not None:
        return node_price * machine.num_nodes
    each = machine.gpu.price_per_hour
    return None if each is None else each * machine.world_size


def run_cost(
    run: Workload, machine: Machine, step: StepTime, node_price: float | None = None, evaluated_steps: float = 0.0
) -> Cost:
    """`evaluated_steps` is what evaluation reads in all, in global batches."""
    seconds = step.total_seconds
    rate = run.tokens_per_step / seconds
    run_seconds = seconds * (run.train_steps + EVALUATION_SHARE * evaluated_steps)
    price = price_per_hour(machine, node_price)
    peak = machine.gpu.matmul_flops(run.precision, run.tf32) * machine.world_size
    return Cost(
        step=step,
        tokens_per_second=rate,
        model_flops_utilization=rate * flops_per_token(run.shape, run.sequence_length) / peak,
        run_seconds=run_seconds,
        dollars=None if price is None else price * run_seconds / SECONDS_PER_HOUR,
    )


def petaflop_s_days(run: Workload) -> float:
    """Arithmetic of the whole run in days at 1e15 FLOP a second, the unit of arXiv:2005.14165, figure 2.2."""
    return run.tokens * flops_per_token(run.shape, run.sequence_length) / (1e15 * SECONDS_PER_DAY)


def compute_optimal_tokens(run: Workload) -> int:
    return TOKENS_PER_PARAMETER * run.shape.active_parameters


def checkpoint_bytes(run: Workload) -> int:
    """Disk that one checkpoint takes: the weights, and fp32 weights and two moments, of Muon's matrices one; fp32 at
    stage 0 is its own master.

    14 bytes a parameter in 16 bits. Stage 3 writes between 12 and 14, as much of the weights as is not partitioned.
    """
    states = 8 if run.precision == "fp32" and run.zero.stage == 0 else 12
    return (run.element_bytes + states) * run.shape.allocated_parameters - spared_bytes(run)


def room_for_checkpoints(complete: int, each_bytes: int, keep_last: int) -> tuple[int, int]:
    """How many more checkpoints a run comes to keep beside those that are `complete`, and their bytes: one more than
    `keep_last` at a time, since an old one goes only after a new one is complete."""
    missing = max(0, keep_last + 1 - complete)
    return missing, missing * each_bytes
