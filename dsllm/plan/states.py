"""Weights, gradients and optimizer states of one rank, and what moves between ranks, at the moments of a step.

As DeepSpeed 0.19.8 lays them out; each term names where it is made. P is the allocated parameters, E those of the token
embedding, N the ranks, w the bytes of a weight, a those of an accumulated gradient, b the elements of a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsllm.plan.activations import Device
from dsllm.plan.buckets import (
    live_elements,
    persistence_threshold_elements,
    reduce_bucket_elements,
    sub_group_elements,
)
from dsllm.plan.partitions import Flush, Partition, flushes, partition
from dsllm.plan.workload import ELEMENT_BYTES, Workload

Moment = Literal[
    "between",
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


@dataclass(frozen=True)
class Layout:
    """What decides the size of the states of a run on a number of ranks."""

    run: Workload
    world_size: int
    device: Device
    accumulates: bool
    """Whether micro-batches before the last have left gradients."""
    parameters: int

    @property
    def weight(self) -> int:
        return self.run.element_bytes

    @property
    def accumulation(self) -> int:
        return ELEMENT_BYTES[self.run.accumulation_precision]

    @property
    def stage(self) -> int:
        return self.run.zero.stage

    @property
    def partition(self) -> Partition:
        return partition(self.run.shape.tensors, self.world_size)

    @property
    def flushes(self) -> tuple[Flush, ...]:
        """Stages 1 and 2: what is reduced at a time, in the order of backward."""
        return flushes(self.run.shape.tensors, self.world_size, self.bucket)

    @property
    def bucket(self) -> int:
        """Elements, of which stages 1 to 3 allocate all."""
        return reduce_bucket_elements(self.run.zero, self.run.shape)

    @property
    def buckets(self) -> int:
        """Two where reduction overlaps with computation, below stage 3."""
        return 2 if self.run.zero.overlaps and self.stage < 3 else 1

    @property
    def embedding(self) -> int:
        return self.run.shape.embedding_parameters

    @property
    def head_gradient(self) -> int:
        """Bytes of the projection's gradient, which waits for the embedding's where the two share their weights."""
        return self.weight * self.embedding if self.run.shape.tie_word_embeddings else 0

    @property
    def largest_tensor(self) -> int:
        return max(tensor.elements for tensor in self.run.shape.tensors)

    @property
    def share(self) -> int:
        """Parameters that a rank steps."""
        return -(-self.parameters // self.world_size)


def parameters_bytes(layout: Layout) -> int:
    """Weights in the training precision: wP; at stage 3 the rank's part of each tensor, and small tensors whole."""
    run = layout.run
    if layout.stage < 3:
        return layout.weight * layout.parameters
    persistent = layout.weight * _persistent_elements(layout)
    return persistent + (layout.weight * layout.share if run.zero.offload_param == "none" else 0)


def _persistent_elements(layout: Layout) -> int:
    threshold = persistence_threshold_elements(layout.run.zero, layout.run.shape)
    sizes = (tensor.elements for tensor in layout.run.shape.tensors)
    return 0 if layout.world_size == 1 else sum(size for size in sizes if size <= threshold)


def optimizer_bytes(layout: Layout) -> int:
    """fp32 master copy and two Adam moments, 4 + 4 + 4 bytes a parameter, partitioned from stage 1 on.

    fp32 weights are their own master at stage 0; the ZeRO optimizers make a copy of the partition all the same
    (ZeRO, arXiv:1910.02054, section 3.1).
    """
    if layout.run.zero.offload_optimizer != "none":
        return 0
    if layout.stage == 0:
        return layout.parameters * (8 if layout.run.precision == "fp32" else 12)
    return 12 * layout.share


def moments(layout: Layout) -> dict[Moment, Held]:
    """What there is at each moment of the last micro-batch of a step, and of the step itself.

    `between` is between two micro-batches: DeepSpeed's `step` is called there too.
    """
    found = _moments(layout)
    return {"between": found["forward"], **found}


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
        "embedding": Held(blocks + head + embedding),
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
        "embedding": Held(blocks + head + embedding),
        "reduction": Held(always + whole, (4 + w) * flat),
        "update": Held(always + whole, gathered),
    }


def _whole_tensors(layout: Layout) -> dict[Moment, Held]:
    """Stages 1 and 2 where gradients add up in the weights' type: reduced in buckets, and kept as whole tensors of
    which the rank steps a part (runtime/zero/stage_1_and_2.py, copy_grads_in_partition).

    Stage 1 reduces in the last micro-batch only, and until then keeps all gradients, and the bucket with them; stage 2
    reduces in each, and adds to what it kept.
    """
    w, head, embedding = layout.weight, layout.head_gradient, layout.weight * layout.embedding
    kept, bucket = w * layout.partition.touched, w * layout.bucket * layout.buckets
    last = layout.flushes[-1]
    reduces_once = layout.stage == 1 and layout.accumulates
    before = w * layout.parameters if reduces_once else kept if layout.accumulates else 0
    held_bucket = bucket if reduces_once else 0
    left = embedding if reduces_once else before  # of that, what has not moved into the bucket by the end
    flushed = kept if len(layout.flushes) > 1 else 0
    return {
        "forward": Held(before, held_bucket),
        "loss_backward": Held(before, held_bucket),
        "last_block": Held(before + head, bucket),
        **_early_flush(layout, before, kept, head, bucket),
        "first_block": Held(left + head + flushed, bucket),
        "embedding": Held(left + head + embedding + flushed, bucket),
        "reduction": Held(
            (0 if reduces_once else before) + kept + w * last.beside_bucket, bucket + w * last.copied_merged
        ),
        "norm": Held(kept, 0, NORM_BYTES * layout.partition.largest_piece),
        "update": Held(kept, 0, (w if w < 4 else 0) * layout.share + 4 * layout.share),
    }


def _early_flush(layout: Layout, before: int, kept: int, head: int, bucket: int) -> dict[Moment, Held]:
    """The larger of the first two reductions, while most activations are alive; nothing where there is but one.

    The tensors that the rank keeps are allocated after the first.
    """
    if len(layout.flushes) == 1:
        return {}
    w, (first, second) = layout.weight, layout.flushes[:2]
    moves = layout.stage == 1 and layout.accumulates  # gradients that were there before are freed as they are moved
    one = Held(before - (w * first.elements if moves else 0) + head, bucket + w * first.copied_merged)
    moved = w * (first.elements + second.elements) if moves else 0
    two = Held(before - moved + kept + head, bucket + w * second.copied_merged)
    return {"first_flush": max(one, two, key=lambda held: held.gradients + held.communication)}


def _compact(layout: Layout) -> dict[Moment, Held]:
    """Stages 1 and 2 where 16-bit gradients add up in fp32: into a flat fp32 buffer of just the partition
    (_build_compact_grad_partition_buffer), which a bucket's share is cast to on the way.

    Stage 1 (fp16 only) keeps whole fp32 gradients until the last micro-batch, and its bucket is fp32 too.
    """
    w, head, embedding = layout.weight, layout.head_gradient, layout.weight * layout.embedding
    staged = 4 if layout.stage == 1 else w
    flat, bucket = 4 * layout.partition.elements, staged * layout.bucket * layout.buckets
    first, last = layout.flushes[0], layout.flushes[-1]
    reduces_once = layout.stage == 1 and layout.accumulates
    before = 4 * layout.parameters if reduces_once else flat if layout.accumulates else 0
    flushed = flat if layout.accumulates or len(layout.flushes) > 1 else 0
    # stage 1: what the blocks have not given to the bucket yet
    left = before - 4 * first.elements if reduces_once else 0
    early = Held(left + flat + head, bucket + w * first.copied, 4 * first.largest_piece)
    return {
        "forward": Held(before, bucket if reduces_once else 0),
        "loss_backward": Held(before, bucket if reduces_once else 0),
        "last_block": Held(before + head, bucket),
        **({"first_flush": early} if len(layout.flushes) > 1 else {}),
        "first_block": Held(flushed + head, bucket),
        "embedding": Held(flushed + head + embedding, bucket),
        "reduction": Held(flat + w * last.beside_bucket, bucket + w * last.copied, 4 * last.largest_piece),
        "norm": Held(flat, 0, NORM_BYTES * layout.partition.largest_piece),
        "update": Held(flat),
    }


def _offloaded(layout: Layout) -> dict[Moment, Held]:
    """Stages 1 and 2 with the optimizer on the host: gradients leave the GPU as soon as they are reduced."""
    w, head, embedding = layout.weight, layout.head_gradient, layout.weight * layout.embedding
    whole, bucket = w * layout.parameters, w * layout.bucket * layout.buckets
    flat = w * min(layout.bucket, layout.parameters) if layout.world_size > 1 else 0
    before = whole if layout.stage == 1 and layout.accumulates else 0
    return {
        "forward": Held(before),
        "loss_backward": Held(before),
        "last_block": Held(before + head, bucket),
        "first_block": Held(before + head, bucket),
        "embedding": Held(before + head + embedding, bucket),
        "reduction": Held(before + embedding, bucket + flat),
    }


def _stage_3(layout: Layout) -> dict[Moment, Held]:
    """Stage 3 (runtime/zero/stage3.py): flat gradients of the partition and the bucket exist always; whole weights are
    gathered for use, at most `live_elements` of them."""
    run, w, head = layout.run, layout.weight, layout.head_gradient
    embedding = w * layout.embedding
    offloads = run.zero.offload_optimizer != "none"
    kept = 0 if offloads else layout.accumulation * layout.share
    bucket = w * layout.bucket
    live = 0 if layout.world_size == 1 else min(live_elements(run.zero, run.shape), layout.parameters)
    gathered = w * live
    reduced = max(min(layout.bucket, layout.parameters), layout.embedding)
    parts = 4 * -(-reduced // layout.world_size) if layout.accumulation != w else 0
    copy = w * reduced if layout.device == "cpu" else 0  # gloo reduces in a copy of its own
    sub_group = min(sub_group_elements(run.shape), layout.share)
    update = 0 if offloads else (4 + (layout.accumulation if layout.accumulation < 4 else 0)) * sub_group
    norm = 0 if offloads else NORM_BYTES * -(-layout.largest_tensor // layout.world_size)
    return {
        "forward": Held(kept, bucket + gathered),
        "loss_backward": Held(kept, bucket + gathered),
        "last_block": Held(kept + head, bucket + gathered),
        "first_block": Held(kept + head, bucket + gathered),
        "embedding": Held(kept + head + embedding, bucket + gathered),
        "reduction": Held(kept + embedding, bucket + gathered + w * reduced, max(parts, copy)),
        "norm": Held(kept, bucket, norm),
        "update": Held(kept, bucket, update),
    }


def host_bytes(layout: Layout) -> int:
    """Pinned host memory of all ranks together: states that live there, or the buffers through which NVMe is read."""
    run, parameters = layout.run, layout.share * layout.world_size
    total = 0
    if run.zero.offload_optimizer == "cpu":
        # master and moments; fp32 gradients; stages 1 and 2 a staging copy of the weights, stage 3 the flat gradients
        staging = layout.accumulation if layout.stage == 3 else layout.weight
        total += (12 + 4 + staging) * parameters
    if run.zero.offload_optimizer == "nvme":
        total += 4 * 4 * min(sub_group_elements(run.shape), layout.share) * layout.world_size
        total += layout.accumulation * parameters
    if run.zero.offload_param == "cpu":
        total += layout.weight * parameters
    if run.zero.offload_param == "nvme":
        largest = max(layout.embedding, run.shape.parameters_per_layer)
        total += 5 * layout.weight * largest * layout.world_size
    return total
