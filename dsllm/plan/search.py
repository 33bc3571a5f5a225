"""The choices that dsllm makes for a spec: the micro-batch size, and the variants that it compares."""

from __future__ import annotations

from dsllm.plan.batch import micro_batch_choices, resolve_batch
from dsllm.plan.memory import estimate_memory
from dsllm.spec.sections import Spec, Zero


def choose_micro_batch(spec: Spec, world_size: int, device_memory_bytes: int) -> int:
    """Sequences per forward on each rank: the spec's own number, or for `auto` the largest that is predicted to fit.

    Only sizes that divide a rank's share of the global batch are considered, and 1 is taken where nothing fits: the
    estimate may be wrong, and the run is the judge. Raises UserError where the batch does not divide over the ranks.
    """
    if spec.batch.micro_batch_size != "auto":
        return resolve_batch(spec.batch, world_size).micro_batch_size
    sizes = micro_batch_choices(spec.batch, world_size)
    fitting = [size for size in sizes if estimate_memory(spec, world_size, size).fits(device_memory_bytes)]
    return max(fitting, default=1)


def at_stage(spec: Spec, stage: int) -> Spec:
    """The same run at another ZeRO stage, without the offloads and tuning that the stage does not have."""
    zero = spec.zero
    if stage == zero.stage:
        return spec
    below = stage < 3
    changed = Zero(
        stage=stage,
        offload_optimizer="none"
        if stage == 0 or (below and zero.offload_optimizer == "nvme")
        else zero.offload_optimizer,
        offload_param="none" if below else zero.offload_param,
        nvme_path=None if below else zero.nvme_path,
        reduce_bucket_elements=None if stage < 2 else zero.reduce_bucket_elements,
    )
    given = spec.training.gradient_accumulation_precision
    training = spec.training.model_copy(update={"gradient_accumulation_precision": given if stage else "auto"})
    return spec.model_copy(update={"zero": changed, "training": training})
