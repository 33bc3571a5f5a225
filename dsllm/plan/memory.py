"""What a run holds on each GPU, as a sum of named terms at four moments of a step.

The states follow ZeRO (arXiv:1910.02054, section 3) as DeepSpeed 0.19.8 lays them out. P is the allocated parameters,
N the ranks, w the bytes of a weight, a the bytes of an accumulated gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dsllm.plan.activations import activations_bytes, block_gradients_bytes, logits_bytes
from dsllm.plan.buckets import SUB_GROUP_ELEMENTS, live_elements, reduce_bucket_elements
from dsllm.plan.hardware import GPUS
from dsllm.plan.model_shape import ModelShape, model_shape
from dsllm.plan.precision import ELEMENT_BYTES, accumulation_precision, runs_bf16_optimizer
from dsllm.spec.sections import Spec
from dsllm.units import GIB

Phase = Literal["forward", "backward", "step"]

RUNTIME_BYTES = GIB
"""The CUDA context, kernels' workspaces and NCCL's buffers: not among what torch counts, but on the card."""

FITTING_SHARE = 0.95
"""Share of a card that a run may be predicted to use: the rest is for fragmentation."""

ENGINE_BUCKET_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed's engine reduces at a time where no ZeRO optimizer does (MEMORY_OPT_ALLREDUCE_SIZE)."""


@dataclass(frozen=True)
class Terms:
    """Bytes on one GPU at one moment."""

    parameters_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    activations_bytes: int = 0
    logits_bytes: int = 0
    communication_bytes: int = 0
    temporaries_bytes: int = 0
    runtime_bytes: int = RUNTIME_BYTES

    @property
    def total_bytes(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class MemoryEstimate:
    """The predicted peak of a rank, and where it comes from."""

    parameters: int
    allocated_parameters: int
    zero_stage: int
    world_size: int
    phases: Mapping[Phase, Terms]
    host_bytes: int
    """Host memory of all ranks together, for what is offloaded."""

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: self.phases[phase].total_bytes)

    @property
    def peak(self) -> Terms:
        """The terms alive in the peak phase."""
        return self.phases[self.peak_phase]

    def fits(self, memory_bytes: int) -> bool:
        """Whether a card of that size holds the run, with a margin for fragmentation."""
        return self.peak.total_bytes <= memory_bytes * FITTING_SHARE

    def as_dict(self) -> dict[str, Any]:
        """The JSON that scripts rely on; bytes are whole numbers."""
        return {
            "parameters": self.parameters,
            "allocated_parameters": self.allocated_parameters,
            "zero_stage": self.zero_stage,
            "world_size": self.world_size,
            "per_gpu": {**asdict(self.peak), "total_bytes": self.peak.total_bytes},
            "peak_phase": self.peak_phase,
            "phases": {
                phase: {**asdict(terms), "total_bytes": terms.total_bytes} for phase, terms in self.phases.items()
            },
            "host_bytes": self.host_bytes,
            "fits": {gpu.name: self.fits(gpu.memory_bytes) for gpu in GPUS},
        }


def estimate_memory(
    spec: Spec, world_size: int, micro_batch_size: int, parameters: int | None = None
) -> MemoryEstimate:
    """The memory of each of `world_size` ranks; `parameters` overrules the count that follows from the spec's shape."""
    shape = model_shape(spec)
    allocated = parameters or shape.allocated_parameters
    layout = StateLayout.of(spec, allocated, world_size)
    accumulates = spec.batch.global_batch_size > micro_batch_size * world_size
    return MemoryEstimate(
        parameters=parameters or shape.parameters,
        allocated_parameters=allocated,
        zero_stage=spec.zero.stage,
        world_size=world_size,
        phases=_phases(spec, shape, layout, micro_batch_size, accumulates),
        host_bytes=host_bytes(spec, shape, layout),
    )


@dataclass(frozen=True)
class StateLayout:
    """What decides the size of weights, gradients and optimizer states."""

    allocated_parameters: int
    partition: int
    """Parameters that a rank is responsible for, P / N rounded up."""
    world_size: int
    weight_bytes: int
    accumulation_bytes: int
    is_bf16_optimizer: bool

    @classmethod
    def of(cls, spec: Spec, allocated_parameters: int, world_size: int) -> StateLayout:
        return cls(
            allocated_parameters=allocated_parameters,
            partition=-(-allocated_parameters // world_size),
            world_size=world_size,
            weight_bytes=ELEMENT_BYTES[spec.training.precision],
            accumulation_bytes=ELEMENT_BYTES[accumulation_precision(spec)],
            is_bf16_optimizer=runs_bf16_optimizer(spec),
        )


def _phases(
    spec: Spec, shape: ModelShape, layout: StateLayout, micro_batch_size: int, accumulates: bool
) -> dict[Phase, Terms]:
    parameters, optimizer = parameters_bytes(spec, layout), optimizer_bytes(spec, layout)
    held, full = gradients_bytes(spec, layout, accumulates)
    activations = activations_bytes(spec, shape, micro_batch_size)
    logits_forward, logits_backward = logits_bytes(spec, shape, micro_batch_size)
    in_flight = block_gradients_bytes(spec, shape, micro_batch_size)
    gathered = gathered_bytes(spec, shape, layout)
    forward = Terms(parameters, held, optimizer, activations, logits_forward, gathered)
    start = Terms(
        parameters,
        held,
        optimizer,
        activations,
        logits_backward,
        gathered + bucket_bytes(spec, shape, layout),
        in_flight,
    )
    end = Terms(
        parameters,
        full,
        optimizer,
        activations // shape.num_layers,
        0,
        gathered + bucket_bytes(spec, shape, layout) + engine_reduction_bytes(spec, layout),
        in_flight,
    )
    step = Terms(parameters, full, optimizer, 0, 0, 0, step_bytes(spec, layout))
    return {"forward": forward, "backward": max(start, end, key=lambda terms: terms.total_bytes), "step": step}


def parameters_bytes(spec: Spec, layout: StateLayout) -> int:
    """Weights in the training precision: wP, at stage 3 wP/N, on the host where they are offloaded."""
    if spec.zero.offload_param != "none":
        return 0
    return layout.weight_bytes * (layout.partition if spec.zero.stage == 3 else layout.allocated_parameters)


def optimizer_bytes(spec: Spec, layout: StateLayout) -> int:
    """fp32 master copy and two Adam moments, 4 + 4 + 4 bytes a parameter, partitioned from stage 1 on.

    fp32 weights are their own master at stage 0; the ZeRO optimizers make a copy of the partition all the same.
    """
    if spec.zero.offload_optimizer != "none":
        return 0
    if spec.zero.stage == 0:
        return layout.allocated_parameters * (8 if spec.training.precision == "fp32" else 12)
    return 12 * layout.partition


def gradients_bytes(spec: Spec, layout: StateLayout, accumulates: bool) -> tuple[int, int]:
    """Gradients during forward, where micro-batches before this one left some, and at the end of backward."""
    whole, partition = layout.allocated_parameters, layout.partition
    if spec.zero.stage == 0:
        return (layout.weight_bytes * whole if accumulates else 0), layout.weight_bytes * whole
    if layout.is_bf16_optimizer:
        # a whole fp32 buffer that always exists, and bf16 gradients until they are added to it after backward
        return 4 * whole, 6 * whole
    if spec.zero.stage == 3:
        flat = 0 if spec.zero.offload_optimizer != "none" else layout.accumulation_bytes * partition
        return flat, flat
    if spec.zero.offload_optimizer != "none":
        return 0, layout.weight_bytes * whole if spec.zero.stage == 1 else 0
    kept = layout.accumulation_bytes * (whole if spec.zero.stage == 1 else partition)
    if not accumulates:
        return 0, kept
    # the partition of this micro-batch exists beside the sum until it is added
    return kept, kept if spec.zero.stage == 1 else 2 * kept


def gathered_bytes(spec: Spec, shape: ModelShape, layout: StateLayout) -> int:
    """Stage 3: the whole parameters of the blocks at work and of those fetched ahead."""
    if spec.zero.stage < 3:
        return 0
    return layout.weight_bytes * min(live_elements(spec.zero, shape), layout.allocated_parameters)


def bucket_bytes(spec: Spec, shape: ModelShape, layout: StateLayout) -> int:
    """The bucket in which gradients are reduced during backward; two where that overlaps with computation."""
    if spec.zero.stage == 0 or layout.is_bf16_optimizer:
        return 0
    overlaps = spec.zero.overlap_comm is True and spec.zero.stage < 3
    bucket = min(reduce_bucket_elements(spec.zero, shape), layout.allocated_parameters)
    return layout.weight_bytes * bucket * (2 if overlaps else 1)


def engine_reduction_bytes(spec: Spec, layout: StateLayout) -> int:
    """Stage 0, and BF16_Optimizer: the flat copy in which the engine reduces gradients after backward."""
    if layout.world_size == 1 or not (spec.zero.stage == 0 or layout.is_bf16_optimizer):
        return 0
    return layout.accumulation_bytes * min(ENGINE_BUCKET_ELEMENTS, layout.allocated_parameters)


def step_bytes(spec: Spec, layout: StateLayout) -> int:
    """What the optimizer step makes and frees beside the states."""
    if spec.zero.offload_optimizer != "none":
        return 0
    if spec.zero.stage == 0:
        # half precision: fp32 gradients, and a flat copy of them for the norm; fp32 steps in place
        return 0 if spec.training.precision == "fp32" else 8 * layout.allocated_parameters
    if layout.is_bf16_optimizer:
        return layout.weight_bytes * layout.partition
    if spec.zero.stage == 3:
        return 4 * min(SUB_GROUP_ELEMENTS, layout.partition)
    # flat fp32 gradients of the partition, and the scaled ones: 8 bytes with those that are already there
    return (8 - layout.accumulation_bytes) * layout.partition


def host_bytes(spec: Spec, shape: ModelShape, layout: StateLayout) -> int:
    """Pinned host memory of all ranks together: states that live there, or the buffers through which NVMe is read."""
    partitions = layout.partition * layout.world_size
    total = 0
    if spec.zero.offload_optimizer == "cpu":
        # master and moments; fp32 gradients; stages 1 and 2 a staging copy of the weights, stage 3 the flat gradients
        staging = layout.accumulation_bytes if spec.zero.stage == 3 else layout.weight_bytes
        total += (12 + 4 + staging) * partitions
    if spec.zero.offload_optimizer == "nvme":
        total += 4 * 4 * min(SUB_GROUP_ELEMENTS, layout.partition) * layout.world_size
        total += layout.accumulation_bytes * partitions
    if spec.zero.offload_param == "cpu":
        total += layout.weight_bytes * partitions
    if spec.zero.offload_param == "nvme":
        largest = max(shape.embedding_parameters, shape.parameters_per_layer)
        total += 5 * layout.weight_bytes * largest * layout.world_size
    return total
