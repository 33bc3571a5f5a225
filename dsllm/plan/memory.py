"""What a run holds on each GPU, as a sum of named terms: the largest that it comes to in forward, backward and step.

Weights and optimizer states are in states.py, gradients and buckets in moments.py, what a micro-batch leaves in
activations.py; here they meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dsllm.plan import states
from dsllm.plan.activations import Activations, activations
from dsllm.plan.hardware import RUNTIME_BYTES, Gpu, bytes_beside, catalogue
from dsllm.plan.moments import Held, Moment, moments
from dsllm.plan.workload import Device, Precision, Workload

Phase = Literal["forward", "backward", "step"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "step")

PHASE_OF: Mapping[Moment, Phase] = {
    "between": "step",
    "head_fetch": "forward",
    "forward": "forward",
    "loss_backward": "backward",
    "last_block": "backward",
    "first_flush": "backward",
    "first_block": "backward",
    "embedding": "backward",
    "reduction": "backward",
    "norm": "step",
    "update": "step",
}

FITTING_SHARE = 0.95
"""Share of a card that a run may be predicted to use: the rest is for fragmentation."""


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
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
            + self.communication_bytes
            + self.temporaries_bytes
            + self.runtime_bytes
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """The predicted peak of a rank, and where it comes from."""

    parameters: int
    active_parameters: int
    """Those that a token meets."""
    allocated_parameters: int
    zero_stage: int
    world_size: int
    phases: Mapping[Phase, Terms]
    kept: Terms
    """What stays from one micro-batch to the next."""
    host_bytes: int
    """Host memory of all ranks together, for what is offloaded."""
    precision: Precision = "bf16"
    device: Device = "cuda"

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: self.phases[phase].total_bytes)

    @property
    def peak(self) -> Terms:
        """The terms alive in the peak phase."""
        return self.phases[self.peak_phase]

    def tensor_bytes(self, phase: Phase) -> int:
        """What torch's allocator holds of it: everything but the device's runtime."""
        return self.phases[phase].total_bytes - self.phases[phase].runtime_bytes

    def with_runtime(self, runtime_bytes: int, reserved_ratio: float = 1.0) -> MemoryEstimate:
        """The same with what the device holds beside tensors, in all phases what it does at the largest."""
        beside = bytes_beside(max(map(self.tensor_bytes, self.phases)), runtime_bytes, reserved_ratio)
        phases = {phase: replace(terms, runtime_bytes=beside) for phase, terms in self.phases.items()}
        return replace(self, phases=phases, kept=replace(self.kept, runtime_bytes=beside))

    def fits(self, memory_bytes: int) -> bool:
        """Whether a card of that size holds the run, with a margin for fragmentation."""
        return self.peak.total_bytes <= memory_bytes * FITTING_SHARE

    def fits_on(self, gpu: Gpu) -> bool:
        """The same of a device that is known, which must also have arithmetic in the run's precision."""
        return self.precision in gpu.flops and self.fits(gpu.memory_bytes)

    def as_dict(self, known: Sequence[Gpu] | None = None) -> dict[str, Any]:
        """The JSON that scripts rely on; bytes are whole numbers.

        `fits` is by the names of the known devices, those of the catalogue when absent, of the kind that the estimate
        is for: GPUs, or the CPU alone.
        """
        devices = [gpu for gpu in known or catalogue() if gpu.is_cpu == (self.device == "cpu")]
        return {
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "allocated_parameters": self.allocated_parameters,
            "zero_stage": self.zero_stage,
            "world_size": self.world_size,
            "per_gpu": {**asdict(self.peak), "total_bytes": self.peak.total_bytes},
            "peak_phase": self.peak_phase,
            "phases": {
                phase: {**asdict(terms), "total_bytes": terms.total_bytes} for phase, terms in self.phases.items()
            },
            "host_bytes": self.host_bytes,
            "fits": {gpu.name: self.fits_on(gpu) for gpu in devices},
        }


def estimate_memory(
    run: Workload,
    world_size: int,
    micro_batch_size: int,
    parameters: int | None = None,
    *,
    device: Device = "cuda",
    runtime_bytes: int | None = None,
    reserved_ratio: float = 1.0,
    traced: Activations | None = None,
) -> MemoryEstimate:
    """The memory of each of `world_size` ranks.

    `parameters` overrules the count that follows from the shape, `runtime_bytes` and `reserved_ratio` the device's
    constants, and `traced` the arithmetic of activations.
    """
    layout = states.Layout(
        run=run,
        world_size=world_size,
        device=device,
        accumulates=run.global_batch_size > micro_batch_size * world_size,
        parameters=parameters or run.shape.allocated_parameters,
    )
    if runtime_bytes is None:
        runtime_bytes = RUNTIME_BYTES if device == "cuda" else 0
    acts = traced or activations(run, micro_batch_size, device)
    always = Terms(states.parameters_bytes(layout), 0, states.optimizer_bytes(layout), runtime_bytes=0)
    held = moments(layout)
    tensors = MemoryEstimate(
        parameters=parameters or run.shape.parameters,
        active_parameters=parameters or run.shape.active_parameters,
        allocated_parameters=layout.parameters,
        zero_stage=run.zero.stage,
        world_size=world_size,
        phases=_phases(always, held, acts, layout),
        kept=replace(
            always,
            gradients_bytes=held["between"].gradients,
            communication_bytes=held["between"].communication,
        ),
        host_bytes=states.host_bytes(layout),
        precision=run.precision,
        device=device,
    )
    return tensors.with_runtime(runtime_bytes, reserved_ratio)


def _phases(
    always: Terms, held_at: Mapping[Moment, Held], acts: Activations, layout: states.Layout
) -> dict[Phase, Terms]:
    """The largest moment of each phase."""
    largest: dict[Phase, Terms] = {}
    for moment, held in held_at.items():
        kept, logits, gradients = _of_micro_batch(moment, acts, layout)
        terms = replace(
            always,
            gradients_bytes=held.gradients,
            activations_bytes=kept,
            logits_bytes=logits,
            communication_bytes=held.communication,
            temporaries_bytes=held.temporaries + gradients,
        )
        phase = PHASE_OF[moment]
        if phase not in largest or terms.total_bytes > largest[phase].total_bytes:
            largest[phase] = terms
    return largest


def _of_micro_batch(moment: Moment, acts: Activations, layout: states.Layout) -> tuple[int, int, int]:
    """Activations, the loss's share and gradients of activations at a moment."""
    saved, in_flight = acts.saved_bytes, max(0, acts.block_backward_bytes)
    if moment == "head_fetch":
        return saved, 0, 0
    if moment == "forward":
        return saved, acts.loss_forward_bytes, 0
    if moment == "loss_backward":
        return saved, acts.loss_backward_bytes, 0
    if moment == "last_block":
        return saved, 0, acts.block_backward_bytes
    if moment == "first_flush":
        # Backward has freed as large a share of the activations as a bucket is of the parameters.
        left = int(saved * max(0.0, 1 - layout.bucket / layout.parameters))
        return max(left, acts.first_block_bytes - in_flight), 0, in_flight
    if moment == "first_block":
        return acts.first_block_bytes, 0, 0
    return 0, 0, 0  # the embedding's backward is the last, and a step begins when backward has freed everything
