"""What a prediction needs to know of a run: plain numbers, so that planning from a number of parameters is instant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dsllm.plan.model_shape import ModelShape, model_shape
from dsllm.spec.derived import dropout

if TYPE_CHECKING:
    from dsllm.spec.sections import Spec

Precision = Literal["bf16", "fp16", "fp32"]
Checkpointing = Literal["none", "selective", "full"]
LossImplementation = Literal["chunked", "fused", "plain"]
OffloadDevice = Literal["none", "cpu", "nvme"]
Device = Literal["cuda", "cpu"]
"""What ranks run on."""

CHECKPOINTINGS: tuple[Checkpointing, ...] = ("none", "selective", "full")
"""From the least arithmetic to the least memory."""

CHECKPOINTED_BLOCKS = {"selective": 2, "full": 1}
"""Every how many blocks, from the first on, activations are computed again in backward."""

ELEMENT_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class ZeroSettings:
    """The spec's section `zero`; sizes that are None are fitted to the model (see buckets.py)."""

    stage: int = 0
    offload_optimizer: OffloadDevice = "none"
    offload_param: OffloadDevice = "none"
    overlap_comm: bool | Literal["auto"] = "auto"
    reduce_bucket_elements: int | None = None
    gather_bucket_elements: int | None = None
    persistence_threshold_elements: int | None = None
    max_live_elements: int | None = None

    @property
    def overlaps(self) -> bool:
        """`auto` is on at stage 3 and off below."""
        return self.stage == 3 if self.overlap_comm == "auto" else self.overlap_comm

    def at_stage(self, stage: int) -> ZeroSettings:
        """The same at another stage, without the offloads and tuning that the stage does not have."""
        if stage == self.stage:
            return self
        has_no_nvme = stage < 3 and self.offload_optimizer == "nvme"
        return ZeroSettings(
            stage=stage,
            offload_optimizer="none" if stage == 0 or has_no_nvme else self.offload_optimizer,
            offload_param=self.offload_param if stage == 3 else "none",
            overlap_comm=self.overlap_comm if stage else "auto",
            reduce_bucket_elements=self.reduce_bucket_elements if stage else None,
        )


@dataclass(frozen=True)
class Workload:
    """A run without its world: what decides bytes, seconds and dollars, given ranks and micro-batch."""

    shape: ModelShape
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int | None
    """Sequences; None leaves the choice to the planner."""
    train_steps: int
    precision: Precision = "bf16"
    tf32: bool = True
    """Whether fp32 matrix products may round their inputs to TF32 on a GPU that has it."""
    gradient_accumulation_precision: Precision | Literal["auto"] = "auto"
    activation_checkpointing: Checkpointing = "none"
    loss: LossImplementation = "chunked"
    attention: Literal["sdpa", "eager"] = "sdpa"
    dropout: float = 0.0
    masks_documents: bool = False
    """Whether attention stays within a document, which takes a mask."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    zero: ZeroSettings = ZeroSettings()

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.train_steps * self.tokens_per_step

    @property
    def element_bytes(self) -> int:
        """Of a weight, an activation, a gradient."""
        return ELEMENT_BYTES[self.precision]

    @property
    def num_checkpointed(self) -> int:
        """Blocks whose activations are computed again."""
        every = CHECKPOINTED_BLOCKS.get(self.activation_checkpointing)
        return -(-self.shape.num_layers // every) if every else 0

    @property
    def accumulation_precision(self) -> Precision:
        """Type in which gradients add up: fp32 unless told otherwise, but at stage 0 always that of the weights."""
        if self.zero.stage == 0:
            return self.precision
        given = self.gradient_accumulation_precision
        return "fp32" if given == "auto" else given

    @property
    def runs_bf16_optimizer(self) -> bool:
        """Whether DeepSpeed runs its BF16_Optimizer: stage 1, bf16 weights, fp32 gradients, nothing offloaded.

        Read in DeepSpeed 0.19.8, runtime/engine.py, _do_optimizer_sanity_check.
        """
        return (
            self.zero.stage == 1
            and self.precision == "bf16"
            and self.accumulation_precision == "fp32"
            and self.zero.offload_optimizer == "none"
        )

    def at_stage(self, stage: int) -> Workload:
        """The same run at another ZeRO stage."""
        return self.with_zero(self.zero.at_stage(stage))

    def with_zero(self, zero: ZeroSettings) -> Workload:
        """The same run with these settings, without what a spec may not say beside them (spec/rules.py).

        Stage 0 cannot add gradients up in another type than the weights', and nothing tunes the reduction of
        DeepSpeed's BF16_Optimizer.
        """
        given = self.gradient_accumulation_precision
        has_own_type = zero.stage > 0 or given == self.precision
        run = replace(self, zero=zero, gradient_accumulation_precision=given if has_own_type else "auto")
        if not run.runs_bf16_optimizer:
            return run
        overlap: bool | Literal["auto"] = "auto" if zero.overlap_comm is True else zero.overlap_comm
        return replace(run, zero=replace(zero, reduce_bucket_elements=None, overlap_comm=overlap))


def workload(spec: Spec, loss: LossImplementation | None = None, shape: ModelShape | None = None) -> Workload:
    """The workload of a spec. `loss` is what `auto` comes to on the device at hand: chunked where none is; `shape` that
    of a network whose sizes no formula has."""
    training = spec.training
    implementation: LossImplementation = "chunked" if training.loss == "auto" else training.loss
    micro = spec.batch.micro_batch_size
    return Workload(
        shape=shape or model_shape(spec),
        sequence_length=spec.batch.sequence_length,
        global_batch_size=spec.batch.global_batch_size,
        micro_batch_size=None if micro == "auto" else micro,
        train_steps=spec.train_steps,
        precision=training.precision,
        tf32=training.tf32,
        gradient_accumulation_precision=training.gradient_accumulation_precision,
        activation_checkpointing=training.activation_checkpointing,
        loss=loss or implementation,
        attention=spec.model.attention,
        dropout=dropout(spec.model),
        masks_documents=spec.data.mask_documents,
        optimizer=spec.optimizer.name,
        zero=ZeroSettings(**spec.zero.model_dump(exclude={"nvme_path"})),
    )
