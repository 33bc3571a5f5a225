"""Bytes that leave a GPU in an optimizer step: to the other ranks, and to the host that states are offloaded to.

As DeepSpeed 0.19.8 does with the configuration that dsllm writes; read in its source, the files are named below. P is
the allocated parameters, w the bytes of a weight, N the ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsllm.plan.buckets import gather_bucket_elements, reduce_bucket_elements
from dsllm.plan.workload import ELEMENT_BYTES, Workload


@dataclass(frozen=True)
class Traffic:
    """What collectives move, as bytes that each rank would send to one other, before the ring's (N - 1) / N."""

    gradients_bytes: int
    """During backward; an all-reduce counts twice, being a reduce-scatter and an all-gather."""
    parameters_bytes: int
    """All-gathered: after the step at stages 1 and 2, in forward and backward at stage 3."""
    collectives: int

    @property
    def total_bytes(self) -> int:
        return self.gradients_bytes + self.parameters_bytes


def communication(run: Workload, world_size: int, accumulation_steps: int) -> Traffic:
    """What the ranks exchange in an optimizer step of `accumulation_steps` micro-batches.

    Stage 0 and 1 reduce once a step (engine.py, allreduce_gradients), stages 2 and 3 in every micro-step. Below stage 3
    it is an all-reduce even where the result is partitioned: `use_multi_rank_bucket_allreduce` is on by default
    (stage_1_and_2.py, average_tensor). Stage 3 reduce-scatters, and gathers each block in forward and once more in
    backward (ZeRO, arXiv:1910.02054, section 7).
    """
    if world_size == 1:
        return Traffic(0, 0, 0)
    weights = run.element_bytes * run.shape.allocated_parameters
    reductions = accumulation_steps if run.zero.stage >= 2 else 1
    buckets = math.ceil(run.shape.allocated_parameters / reduce_bucket_elements(run.zero, run.shape))
    if run.zero.stage == 3:
        blocks = run.shape.num_layers + 1
        collectives = accumulation_steps * (2 * blocks + buckets)
        return Traffic(reductions * weights, 2 * reductions * weights, collectives)
    if run.zero.stage == 0:
        return Traffic(2 * weights, 0, buckets)
    gathers = math.ceil(run.shape.allocated_parameters / gather_bucket_elements(run.zero, run.shape))
    return Traffic(2 * reductions * weights, weights, reductions * buckets + gathers)


@dataclass(frozen=True)
class HostTraffic:
    """What offloading moves in an optimizer step, for each rank."""

    pcie_bytes: float
    stepped_parameters: float
    """Parameters that the host's CPU steps."""
    nvme_bytes: float


def host_traffic(run: Workload, world_size: int, accumulation_steps: int) -> HostTraffic:
    """Gradients go to the host in every micro-step, weights come back after the step; NVMe is read and written whole.

    ZeRO-Offload, arXiv:2101.06840, section 4; stage_1_and_2.py, async_inplace_copy_grad_to_fp32_buffer_from_gpu, and
    stage3.py, partition_grads. Offloaded parameters are fetched for forward and for backward.
    """
    share = run.shape.allocated_parameters / world_size
    pcie, nvme, stepped = 0.0, 0.0, 0.0
    if run.zero.offload_optimizer != "none":
        stepped = share
        gradient_bytes = ELEMENT_BYTES[run.accumulation_precision] if run.zero.stage == 3 else run.element_bytes
        pcie += share * (gradient_bytes * accumulation_steps + run.element_bytes)
    if run.zero.offload_optimizer == "nvme":
        nvme += 2 * 12 * share  # fp32 weight and two moments, read and written
    if run.zero.offload_param != "none":
        fetched = 2 * accumulation_steps * run.element_bytes * share
        pcie += fetched
        nvme += fetched if run.zero.offload_param == "nvme" else 0.0
    return HostTraffic(pcie, stepped, nvme)
