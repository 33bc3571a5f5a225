"""Gradients, and what moves between ranks, at the moments of a step (DeepSpeed 0.19.8).

Each function names where in DeepSpeed it was read. P is the allocated parameters, E those of the token embedding, N the
ranks, w the bytes of a weight, b the elements of a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsllm.plan.buckets import live_elements, persistence_threshold_elements, sub_group_elements
from dsllm.plan.muon import orthogonalisation_bytes
from dsllm.plan.states import Layout

Moment = Literal[
    "between",
    "head_fetch",
    "forward",
    "loss_backward",
    "last_block",
    "first_flush",
    "first_block",
    "embedding",
    "reduction",
    "norm",
    "update",
]

ENGINE_BUCKET_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed's engine reduces at a time where no ZeRO optimizer does (MEMORY_OPT_ALLREDUCE_SIZE)."""

NORM_BYTES = 8
"""The ZeRO optimizers square gradients in fp64, a tensor at a time (get_norm_dtype in runtime/zero/utils.py)."""


@dataclass(frozen=True)
class Held:
    """Bytes beside weights and optimizer states."""

    gradients: int = 0
    communication: int = 0
    temporaries: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(
            self.gradients + other.gradients,
            self.communication + other.communication,
            self.temporaries + other.temporaries,
        )

    @property
    def total_bytes(self) -> int:
        return self.gradients + self.communication + self.temporaries


def moments(layout: Layout) -> dict[Moment, Held]:
    """What there is at each moment of the last micro-batch of a step, and of the step itself.

    `between` is between two micro-batches: DeepSpeed's `step` is called there too.
    """
    found = _moments(layout)
    orthogonalised = Held(temporaries=orthogonalisation_bytes(layout.run, layout.world_size))
    update = found.get("update", Held()) + orthogonalised
    return {"between": found["forward"], **found, **({"update": update} if orthogonalised.total_bytes else {})}


def _moments(layout: Layout) -> dict[Moment, Held]:
    if layout.stage == 0:
        return _without_zero(layout)
    if layout.run.runs_bf16_optimizer:
        return _bf16_optimizer(layout)
    if layout.stage == 3:
        return _stage_3(layout)
    if layout.run.zero.offload_optimizer != "none":
        return _offloaded(layout)
    if layout.accumulation == 4 and layout.weight < 4:
        return _compact(layout)
    return _whole_tensors(layout)


def _without_zero(layout: Layout) -> dict[Moment, Held]:
    """Stage 0: whole gradients in the weights' type, reduced by the engine after backward in flat copies.

    In half precision the step makes fp32 gradients, and a flat copy of them (runtime/fp16/fused_optimizer.py).
    """
    w, whole, head = layout.weight, layout.weight * layout.parameters, layout.head_gradient
    embedding = w * layout.embedding
    before = whole if layout.accumulates else 0
    blocks = whole if layout.accumulates else whole - embedding
    flat = w * min(ENGINE_BUCKET_ELEMENTS, layout.parameters)
    update = 0 if layout.run.precision == "fp32" else 8 * layout.parameters
    return {
        "forward": Held(before),
        "loss_backward": Held(before),
        "last_block": Held(before + head + w * layout.run.shape.parameters_per_layer),
        "first_block": Held(blocks + head),
        "embedding": Held(blocks + layout.embedding_gradients),
        "reduction": Held(whole, flat),
        "update": Held(whole, 0, update),
    }


def _bf16_optimizer(layout: Layout) -> dict[Moment, Held]:
    """Stage 1, bf16 weights, fp32 gradients (runtime/bf16_optimizer.py): a whole fp32 gradient buffer that
    always exists, to which bf16 gradients are added after each backward. The engine reduces that buffer in a flat fp32
    copy, cast to bf16 for the wire."""
    parameters, w, head = layout.parameters, layout.weight, layout.head_gradient
    always, whole, embedding = 4 * parameters, w * parameters, w * layout.embedding
    before = always + (whole if layout.accumulates else 0)
    blocks = before if layout.accumulates else always + whole - embedding
    flat = min(ENGINE_BUCKET_ELEMENTS, parameters)
    gathered = w * parameters if layout.device == "cpu" and layout.world_size > 1 else 0
    return {
        "forward": Held(before),
        "loss_backward": Held(before),
        "last_block": Held(before + head),
        "first_block": Held(blocks + head),
        "embedding": Held(blocks + layout.embedding_gradients),
        "reduction": Held(always + whole, (4 + w) * flat),
        "update": Held(always + whole, gathered),
    }


def _whole_tensors(layout: Layout) -> dict[Moment, Held]:
    """Stages 1 and 2 where gradients add up in the weights' type: reduced in buckets, and kept as the whole tensors of
    which the rank steps a part (runtime/zero/stage_1_and_2.py, copy_grads_in_partition).

    Stage 1 reduces in the last micro-batch only, and until then keeps all gradients, and the bucket with them; stage 2
    reduces in each, and adds to what it kept.
    """
    w, head, embedding = layout.weight, layout.head_gradient, layout.weight * layout.embedding
    own, beside = w * layout.partition.elements, w * (layout.partition.touched - layout.partition.elements)
    bucket, last = w * layout.bucket * layout.buckets, layout.flushes[-1]
    if layout.reduces_once:
        before, kept = Held(w * layout.parameters), Held()
        left = Held(embedding)  # of that, what has not moved into the bucket when the embedding's turn comes
    else:
        before = kept = left = Held(own, beside) if layout.accumulates else Held()
    between = before + Held(0, bucket if layout.reduces_once else 0)
    flushed = Held(own, beside) if len(layout.flushes) > 1 else Held()
    reduced = Held(own + w * last.beside_bucket, beside + bucket + w * last.copied_merged)
    norm = NORM_BYTES * layout.partition.largest_piece
    return {
        "forward": between,
        "loss_backward": between,
        "last_block": before + Held(head, bucket),
        **_early_flush(layout, before, Held(own, beside), bucket),
        "first_block": left + flushed + Held(head, bucket),
        "embedding": left + flushed + Held(layout.embedding_gradients, bucket),
        "reduction": kept + reduced,
        "norm": Held(own, beside, norm),
        "update": Held(own, beside, (w if w < 4 else 0) * layout.share + 4 * layout.share),
    }


def _early_flush(layout: Layout, before: Held, kept: Held, bucket: int) -> dict[Moment, Held]:
    """The larger of the first two reductions, while most activations are alive; nothing where there is but one.

    The tensors that the rank keeps are allocated after the first. At stage 1, gradients of earlier micro-batches are
    freed as they move into the bucket.
    """
    if len(layout.flushes) == 1:
        return {}
    w, (first, second) = layout.weight, layout.flushes[:2]
    moved = w if layout.reduces_once else 0
    there = before + Held(layout.head_gradient, bucket)
    one = there + Held(-moved * first.elements, w * first.copied_merged)
    two = there + Held(-moved * (first.elements + second.elements), w * second.copied_merged) + kept
    return {"first_flush": max(one, two, key=lambda held: held.total_bytes)}


def _compact(layout: Layout) -> dict[Moment, Held]:
    """Stages 1 and 2 where 16-bit gradients add up in fp32: into a flat fp32 buffer of just the partition
    (_build_compact_grad_partition_buffer), which a bucket's share is cast to on the way.

    Stage 1 (fp16 only) keeps whole fp32 gradients until the last micro-batch, and its bucket is fp32 too.
    """
    w, head = layout.weight, layout.head_gradient
    staged = 4 if layout.stage == 1 else w
    flat, bucket = 4 * layout.partition.elements, staged * layout.bucket * layout.buckets
    first, last = layout.flushes[0], layout.flushes[-1]
    before = 4 * layout.parameters if layout.reduces_once else flat if layout.accumulates else 0
    flushed = flat if layout.accumulates or len(layout.flushes) > 1 else 0
    # stage 1: what the blocks have not given to the bucket yet
    left = before - 4 * first.elements if layout.reduces_once else 0
    early = Held(left + flat + head, bucket + w * first.copied, 4 * first.largest_piece)
    return {
        "forward": Held(before, bucket if layout.reduces_once else 0),
        "loss_backward": Held(before, bucket if layout.reduces_once else 0),
        "last_block": Held(before + head, bucket),
        **({"first_flush": early} if len(layout.flushes) > 1 else {}),
        "first_block": Held(flushed + head, bucket),
        "embedding": Held(flushed + layout.embedding_gradients, bucket),
        "reduction": Held(flat + w * last.beside_bucket, bucket + w * last.copied, 4 * last.largest_piece),
        "norm": Held(flat, 0, NORM_BYTES * layout.partition.largest_piece),
        "update": Held(flat),
    }


def _offloaded(layout: Layout) -> dict[Moment, Held]:
    """Stages 1 and 2 with the optimizer on the host: gradients leave the GPU as soon as they are reduced."""
    w, head, embedding = layout.weight, layout.head_gradient, layout.weight * layout.embedding
    whole, bucket = w * layout.parameters, w * layout.bucket * layout.buckets
    flat = w * min(layout.bucket, layout.parameters) if layout.world_size > 1 else 0
    before = whole if layout.reduces_once else 0
    return {
        "forward": Held(before),
        "loss_backward": Held(before),
        "last_block": Held(before + head, bucket),
        "first_block": Held(before + head, bucket),
        "embedding": Held(before + layout.embedding_gradients, bucket),
        "reduction": Held(before + embedding, bucket + flat),
    }


def _stage_3(layout: Layout) -> dict[Moment, Held]:
    """Stage 3 (runtime/zero/stage3.py): flat gradients of the partition and the bucket exist always. Whole weights are
    gathered for use: many of them while a bucket is reduced on the way, at the end those of the first modules alone."""
    run, w, head = layout.run, layout.weight, layout.head_gradient
    offloads = run.zero.offload_optimizer != "none"
    kept = 0 if offloads else layout.accumulation * layout.share
    # small tensors stay whole from step to step, beside the rank's part of them
    bucket = w * (layout.bucket + _persistent_elements(layout))
    gathered = w * _gathered_elements(layout, 0)
    refetched = w * _gathered_elements(layout, layout.embedding)
    first_modules = layout.embedding + run.shape.parameters_per_layer
    at_the_end = min(gathered, w * first_modules)
    copied_by_gloo = w * layout.embedding if layout.device == "cpu" and layout.world_size > 1 else 0
    in_bucket = min(layout.bucket, layout.parameters)
    early = Held(kept + head, bucket + refetched) + _reduced_at_stage_3(layout, in_bucket)
    last = _reduced_at_stage_3(layout, max(in_bucket, layout.embedding))
    oversized = w * layout.embedding if layout.embedding > layout.bucket else 0
    sub_group = min(sub_group_elements(run.shape), layout.share)
    update = 0 if offloads else (4 + (layout.accumulation if layout.accumulation < 4 else 0)) * sub_group
    norm = 0 if offloads else NORM_BYTES * -(-layout.largest_tensor // layout.world_size)
    return {
        "head_fetch": Held(kept, bucket + refetched, copied_by_gloo),
        "forward": Held(kept, bucket + gathered),
        "loss_backward": Held(kept, bucket + gathered),
        "last_block": Held(kept + head, bucket + gathered),
        **({"first_flush": early} if layout.parameters > layout.bucket else {}),
        "first_block": Held(kept + head, bucket + at_the_end),
        "embedding": Held(kept + layout.embedding_gradients, bucket + at_the_end),
        "reduction": Held(kept + oversized, bucket + at_the_end) + last,
        "norm": Held(kept, bucket, norm),
        "update": Held(kept, bucket, update),
    }


def _reduced_at_stage_3(layout: Layout, elements: int) -> Held:
    """Gradients laid end to end to be reduced, and the rank's part of them cast where it adds up in a wider type; gloo
    reduces in a copy of its own, which is gone by then."""
    flat = layout.weight * elements
    parts = 4 * -(-elements // layout.world_size) if layout.accumulation != layout.weight else 0
    return Held(0, flat, max(parts, flat if layout.device == "cpu" else 0))


def _persistent_elements(layout: Layout) -> int:
    threshold = persistence_threshold_elements(layout.run.zero, layout.run.shape)
    sizes = (tensor.elements for tensor in layout.run.shape.tensors)
    return 0 if layout.world_size == 1 else sum(size for size in sizes if size <= threshold)


def _gathered_elements(layout: Layout, fetched: int) -> int:
    """Stage 3: whole weights at a time; one rank has no need to gather.

    Prefetching stops at `live_elements`, but takes the tensor at hand whole: where the blocks are more than that, the
    embedding has been let go of by the time that the head needs it, and comes on top, `fetched` elements, with the
    block at work (runtime/zero/partitioned_param_coordinator.py).
    """
    shape, run = layout.run.shape, layout.run
    if layout.world_size == 1:
        return 0
    live = max(live_elements(run.zero, shape), layout.largest_tensor)  # what is at work is whole, whatever the limit
    blocks = shape.num_layers * shape.parameters_per_layer
    on_top = fetched + shape.parameters_per_layer if fetched and blocks > live else 0
    return min(live + on_top, layout.parameters)
