"""Weights and optimizer states of one rank, and the host's share where they are offloaded (DeepSpeed 0.19.8).

P is the allocated parameters, N the ranks, w the bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsllm.plan.buckets import reduce_bucket_elements, sub_group_elements
from dsllm.plan.muon import optimizer_tensors, spared_bytes
from dsllm.plan.partitions import Flush, Partition, flushes, partition
from dsllm.plan.workload import ELEMENT_BYTES, Device, Workload


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
    def reduces_once(self) -> bool:
        """Stage 1 keeps the gradients of all micro-batches until the last, and reduces then."""
        return self.stage == 1 and self.accumulates

    @property
    def accumulation(self) -> int:
        return ELEMENT_BYTES[self.run.accumulation_precision]

    @property
    def stage(self) -> int:
        return self.run.zero.stage

    @property
    def partition(self) -> Partition:
        """What a rank steps of the shape's tensors; scaled where only the number of parameters is known."""
        cut = partition(optimizer_tensors(self.run), self.world_size)
        if self.parameters == self.run.shape.allocated_parameters:
            return cut
        return replace(cut, elements=self.share, touched=max(self.share, cut.touched))

    @property
    def flushes(self) -> tuple[Flush, ...]:
        """Stages 1 and 2: what is reduced at a time, in the order of backward."""
        return flushes(optimizer_tensors(self.run), self.world_size, self.bucket)

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
    def embedding_gradients(self) -> int:
        """Bytes in the embedding's backward: the head's and its own; the plain loss leaves the head's transposed, so
        that their sum is a third."""
        own = self.weight * self.embedding
        return own + self.head_gradient * (2 if self.run.loss == "plain" else 1)

    @property
    def largest_tensor(self) -> int:
        return max(tensor.elements for tensor in self.run.shape.tensors)

    @property
    def share(self) -> int:
        """Parameters that a rank steps."""
        return -(-self.parameters // self.world_size)


def parameters_bytes(layout: Layout) -> int:
    """Weights in the training precision: wP, at stage 3 wP/N, on the host where they are offloaded."""
    if layout.stage < 3:
        return layout.weight * layout.parameters
    return layout.weight * layout.share if layout.run.zero.offload_param == "none" else 0


def optimizer_bytes(layout: Layout) -> int:
    """fp32 master copy and two Adam moments, 4 + 4 + 4 bytes a parameter, partitioned from stage 1 on; of Muon's
    matrices one moment.

    fp32 weights are their own master at stage 0; the ZeRO optimizers make a copy of the partition all the same
    (ZeRO, arXiv:1910.02054, section 3.1).
    """
    if layout.run.zero.offload_optimizer != "none":
        return 0
    if layout.stage == 0:
        return layout.parameters * (8 if layout.run.precision == "fp32" else 12) - spared_bytes(layout.run)
    return 12 * layout.share - spared_bytes(layout.run) // layout.world_size


def host_bytes(layout: Layout) -> int:
    """Pinned host memory of all ranks together: states that live there, or the buffers through which NVMe is read."""
    run, parameters = layout.run, layout.share * layout.world_size
    total = 0
    if run.zero.offload_optimizer == "cpu":
        # master and moments; fp32 gradients; stages 1 and 2 a staging copy of the weights, stage 3 the flat gradients
        staging = layout.accumulation if layout.stage == 3 else layout.weight
        total += (12 + 4 + staging) * parameters - spared_bytes(run)
    if run.zero.offload_optimizer == "nvme":
        total += 4 * 4 * min(sub_group_elements(run.shape), layout.share) * layout.world_size
        total += layout.accumulation * parameters
    if run.zero.offload_param == "cpu":
        total += layout.weight * parameters
    if run.zero.offload_param == "nvme":
        largest = max(layout.embedding, run.shape.parameters_per_layer)
        total += 5 * layout.weight * largest * layout.world_size
    return total
