"""How ZeRO stages 1 and 2 cut the parameters into ranks' shares, and how their gradients fill buckets.

Matrices and vectors are two groups, Muon's a third; each is laid end to end and cut into even shares
(runtime/zero/stage_1_and_2.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from dsllm.plan.model_shape import Tensor


@dataclass(frozen=True)
class Partition:
    """A rank's share: in each number the largest of all ranks'."""

    elements: int
    """Parameters that the rank steps: each group's, divided by the ranks and rounded up to an even number."""
    touched: int
    """Elements of all tensors of which it steps at least a part."""
    largest_piece: int
    """Elements of the largest part of one tensor."""


@dataclass(frozen=True)
class Flush:
    """Gradients that are reduced together."""

    elements: int
    largest_piece: int
    """Elements of the largest part of a tensor that goes to one rank."""
    pieces: int
    """Parts of tensors that go to one rank each."""
    runs: int
    """The same where neighbours that go to the same rank are one."""
    beside_bucket: int
    """Elements of a tensor too large for the bucket, which is reduced alone and where it is."""

    @property
    def copied(self) -> int:
        """Elements that are laid end to end to be reduced; a single piece is reduced in its place."""
        return self.elements if self.pieces > 1 else 0

    @property
    def copied_merged(self) -> int:
        """The same where neighbours are merged."""
        return self.elements if self.runs > 1 else 0


@lru_cache(maxsize=1024)
def partition(tensors: tuple[Tensor, ...], world_size: int) -> Partition:
    """How the parameters are cut for `world_size` ranks."""
    touched = [0] * world_size
    largest_piece = 0
    for tensor, pieces in _pieces(tensors, world_size):
        for rank, elements in pieces:
            touched[rank] += tensor.elements
            largest_piece = max(largest_piece, elements)
    shares = _shares(tensors, world_size)
    return Partition(sum(shares.values()), max(touched), largest_piece)


@lru_cache(maxsize=1024)
def flushes(tensors: tuple[Tensor, ...], world_size: int, bucket_elements: int) -> tuple[Flush, ...]:
    """What is reduced at a time in backward, in which gradients come in the reverse order of the modules."""
    groups: list[list[tuple[Tensor, list[tuple[int, int]]]]] = [[]]
    filled = 0
    for tensor, pieces in reversed(list(_pieces(tensors, world_size))):
        if filled + tensor.elements > bucket_elements and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append((tensor, pieces))
        filled += tensor.elements
    return tuple(_flush(group, bucket_elements) for group in groups)


def _flush(group: list[tuple[Tensor, list[tuple[int, int]]]], bucket_elements: int) -> Flush:
    pieces = [piece for _, pieces in group for piece in pieces]
    ranks = [rank for rank, _ in pieces]
    elements = sum(tensor.elements for tensor, _ in group)
    return Flush(
        elements=elements,
        largest_piece=max(piece for _, piece in pieces),
        pieces=len(pieces),
        runs=1 + sum(before != after for before, after in zip(ranks, ranks[1:])),  # noqa: B905, RUF007 - Python 3.10
        beside_bucket=elements if elements > bucket_elements else 0,
    )


_Group = tuple[bool, bool]


def _group(tensor: Tensor) -> _Group:
    return tensor.is_matrix, tensor.is_muons


def _shares(tensors: tuple[Tensor, ...], world_size: int) -> dict[_Group, int]:
    """Elements of a rank in each group."""
    sums: dict[_Group, int] = defaultdict(int)
    for tensor in tensors:
        sums[_group(tensor)] += tensor.elements
    return {group: 2 * -(-total // (2 * world_size)) for group, total in sums.items()}


def _pieces(tensors: tuple[Tensor, ...], world_size: int) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Each tensor, with the ranks among which it is cut and the elements of each."""
    shares = _shares(tensors, world_size)
    starts: dict[_Group, int] = defaultdict(int)
    for tensor in tensors:
        share, start = shares[_group(tensor)], starts[_group(tensor)]
        end = start + tensor.elements
        starts[_group(tensor)] = end
        ranks = range(start // share, (end - 1) // share + 1)
        yield tensor, [(rank, min(end, (rank + 1) * share) - max(start, rank * share)) for rank in ranks]
