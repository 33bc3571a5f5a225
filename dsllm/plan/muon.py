"""What Muon takes in place of AdamW (engine/muon.py): one moment for the matrices of blocks, and room to orthogonalise
them in the step."""

from __future__ import annotations

from dsllm.plan.model_shape import Tensor
from dsllm.plan.workload import Workload

MOMENT_BYTES = 4
"""fp32, of which AdamW keeps two for a parameter and Muon one."""

EXCHANGED_ELEMENTS = 2**25
"""Elements that a rank sends, and receives, at a time at most, one matrix apart: 64 MiB in bf16."""

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COPIES = 5
"""Of a matrix at once: as it came, normalised, scaled, the product of an iteration and their sum."""


def optimizer_tensors(run: Workload) -> tuple[Tensor, ...]:
    """The parameters in the groups of the run's optimizer: Muon's are the matrices, but for what looks tokens and
    positions up, which come first, and the head, which comes last."""
    shape = run.shape
    if run.optimizer != "muon":
        return shape.tensors
    first = 1 + bool(shape.position_parameters)
    last = len(shape.tensors) - (0 if shape.tie_word_embeddings else 1)
    hidden = (tensor._replace(is_muons=tensor.is_matrix) for tensor in shape.tensors[first:last])
    return (*shape.tensors[:first], *hidden, *shape.tensors[last:])


def muon_parameters(run: Workload) -> int:
    """All of Muon's."""
    return sum(tensor.elements for tensor in _muons(run))


def spared_bytes(run: Workload) -> int:
    """What the whole model's optimizer states are smaller by than AdamW's."""
    return MOMENT_BYTES * muon_parameters(run)


def orthogonalisation_flops(run: Workload) -> int:
    """Of a step, over all ranks that share it: in an iteration two products of a matrix with its smaller side, and one
    of that side's square with itself."""
    return NEWTON_SCHULZ_STEPS * sum(
        4 * tensor.smaller_side * tensor.elements + 2 * tensor.stacked * tensor.smaller_side**3
        for tensor in _muons(run)
    )


def orthogonalisation_bytes(run: Workload, world_size: int) -> int:
    """In the step, at most: a tensor as it came and copies of the matrix of it that is at work; and at stage 3, where
    every tensor is cut among the ranks, pieces that go, arrive and come back. A whole tensor arrives at a time at
    least."""
    tensors = _muons(run)
    largest = max((tensor.elements for tensor in tensors), default=0)
    at_work = max((t.elements + (NEWTON_SCHULZ_COPIES - 1) * t.elements // t.stacked for t in tensors), default=0)
    if run.zero.stage < 3 or world_size == 1:
        return run.element_bytes * at_work
    share = -(-sum(tensor.elements for tensor in tensors) // world_size)
    sent = min(EXCHANGED_ELEMENTS, share)
    return run.element_bytes * (at_work + 2 * sent + max(sent, largest))


def _muons(run: Workload) -> list[Tensor]:
    return [tensor for tensor in optimizer_tensors(run) if tensor.is_muons]
