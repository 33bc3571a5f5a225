"""Which rank orthogonalises which matrix, and how the pieces of one travel there and back.

Muon's update of a matrix needs the whole of it, and ZeRO leaves each rank with stretches of a flat tensor. At stages 1
and 2 most matrices lie whole on one rank, which updates them alone; at stage 3 every matrix is cut among all. A matrix
that is cut goes to one of the ranks that hold a part of it, the least busy one, so that the arithmetic is shared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as distributed

from dsllm.engine.fragments import Fragment
from dsllm.plan.muon import EXCHANGED_ELEMENTS


class Piece(NamedTuple):
    """A stretch of a matrix, and where it lies in a rank's flat tensor."""

    rank: int
    start: int
    numel: int
    flat_start: int


@dataclass(frozen=True)
class Matrix:
    """A parameter with two or more dimensions, of which the last two are orthogonalised."""

    shape: tuple[int, ...]
    scale: float
    """What its orthogonal update is multiplied by."""
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def cost(self) -> int:
        """What it takes to orthogonalise, in proportion to others: products with its smaller side."""
        return self.numel * min(self.shape[-2:])


Update = Callable[[torch.Tensor, Matrix], torch.Tensor]
"""What a whole matrix becomes: of the same shape and type."""


@dataclass(frozen=True)
class Exchange:
    """Matrices that are cut, and go from their pieces to their owners and back together."""

    sent: tuple[tuple[Piece, ...], ...]
    """By owner: what this rank holds."""
    received: tuple[tuple[tuple[int, Piece], ...], ...]
    """By holder: what this rank's own matrices are made of, each piece with the place of its matrix in `own`."""
    own: tuple[Matrix, ...]

    def run(self, flat: torch.Tensor, update: Update, dtype: torch.dtype, device: torch.device) -> Iterator[Written]:
        """Update every matrix; what this rank's pieces become. Collective."""
        pieces = [piece for to_one in self.sent for piece in to_one]
        sizes = [sum(piece.numel for piece in to_one) for to_one in self.sent]
        own_sizes = [sum(piece.numel for _, piece in of_one) for of_one in self.received]
        outgoing = torch.cat([flat.narrow(0, p.flat_start, p.numel).to(device, dtype) for p in pieces] or [flat[:0]])
        incoming = _swapped(outgoing.to(device, dtype), sizes, own_sizes)
        self._update_own(incoming, update)
        back = _swapped(incoming, own_sizes, sizes)
        yield from zip(pieces, back.split([piece.numel for piece in pieces]), strict=True)

    def _update_own(self, incoming: torch.Tensor, update: Update) -> None:
        """In place, a matrix at a time."""
        arrived = [place for of_one in self.received for place in of_one]
        parts = incoming.split([piece.numel for _, piece in arrived])
        parts_of: dict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        for (place, piece), part in zip(arrived, parts, strict=True):
            parts_of[place].append((piece.start, part))
        for place, matrix in enumerate(self.own):
            ordered = [part for _, part in sorted(parts_of[place], key=lambda found: found[0])]
            whole = update(torch.cat(ordered).view(matrix.shape), matrix).flatten()
            for part, updated in zip(ordered, whole.split([len(part) for part in ordered]), strict=True):
                part.copy_(updated)


Written = tuple[Piece, torch.Tensor]


@dataclass(frozen=True)
class Division:
    """The matrices of one flat tensor, as this rank has to do with them."""

    whole: tuple[Matrix, ...]
    """Those that lie here and nowhere else."""
    exchanges: tuple[Exchange, ...]

    def run(self, flat: torch.Tensor, update: Update, dtype: torch.dtype, device: torch.device) -> Iterator[Written]:
        """Update all matrices of `flat`; what this rank's pieces of them become. Collective where some are cut."""
        for exchange in self.exchanges:
            yield from exchange.run(flat, update, dtype, device)
        for matrix in self.whole:
            (piece,) = matrix.pieces
            found = flat.narrow(0, piece.flat_start, piece.numel).to(device, dtype)
            yield piece, update(found.view(matrix.shape), matrix).flatten()


@dataclass
class _Share:
    """What is to be divided of one flat tensor."""

    whole: list[Matrix] = field(default_factory=list)
    cut: list[Matrix] = field(default_factory=list)


def divide(
    fragments: Sequence[Sequence[Fragment]],
    shapes: Mapping[int, tuple[int, ...]],
    scales: Mapping[int, float],
    rank: int,
) -> dict[int, Division]:
    """By flat tensor: the division of its matrices, the same on every rank but for who `rank` is.

    `fragments` are those of each rank; `shapes` and `scales` those of the matrices, by their place among the
    parameters. Of other parameters nothing is said.
    """
    shares: dict[int, _Share] = defaultdict(_Share)
    for parameter, group, pieces in _found(fragments, shapes):
        matrix = Matrix(shapes[parameter], scales[parameter], pieces)
        (shares[group].cut if len(pieces) > 1 else shares[group].whole).append(matrix)
    busy = [0] * len(fragments)
    for matrix in (matrix for share in shares.values() for matrix in share.whole):
        busy[matrix.pieces[0].rank] += matrix.cost
    return {
        group: Division(
            tuple(matrix for matrix in share.whole if matrix.pieces[0].rank == rank),
            tuple(_exchange(batch, _owners(batch, busy), rank, len(fragments)) for batch in _batches(share.cut, busy)),
        )
        for group, share in shares.items()
    }


def _found(
    fragments: Sequence[Sequence[Fragment]], shapes: Mapping[int, tuple[int, ...]]
) -> Iterator[tuple[int, int, tuple[Piece, ...]]]:
    """Each matrix with its flat tensor and its pieces, in the order of parameters."""
    pieces: dict[tuple[int, int], list[Piece]] = defaultdict(list)
    for rank, of_rank in enumerate(fragments):
        for fragment in of_rank:
            if fragment.parameter in shapes:
                piece = Piece(rank, fragment.param_start, fragment.numel, fragment.flat_start)
                pieces[fragment.parameter, fragment.group].append(piece)
    for (parameter, group), found in sorted(pieces.items()):
        yield parameter, group, tuple(found)


def _batches(matrices: Sequence[Matrix], busy: Sequence[int]) -> Iterator[list[Matrix]]:
    """Neighbours, as many as the ranks together may have on the way."""
    batch: list[Matrix] = []
    for matrix in matrices:
        if batch and sum(each.numel for each in batch) + matrix.numel > EXCHANGED_ELEMENTS * len(busy):
            yield batch
            batch = []
        batch.append(matrix)
    if batch:
        yield batch


def _owners(matrices: Sequence[Matrix], busy: list[int]) -> list[int]:
    """Of each the least busy of its holders; `busy` grows by what they are given."""
    owners = []
    for matrix in matrices:
        owner = min((piece.rank for piece in matrix.pieces), key=lambda rank: busy[rank])
        busy[owner] += matrix.cost
        owners.append(owner)
    return owners


def _exchange(matrices: Sequence[Matrix], owners: Sequence[int], rank: int, world_size: int) -> Exchange:
    """As `rank` has to do with it. Between two ranks pieces travel in the order of matrices."""
    own = [matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == rank]
    sent: list[list[Piece]] = [[] for _ in range(world_size)]
    received: list[list[tuple[int, Piece]]] = [[] for _ in range(world_size)]
    for matrix, owner in zip(matrices, owners, strict=True):
        for piece in matrix.pieces:
            if piece.rank == rank:
                sent[owner].append(piece)
    for place, matrix in enumerate(own):
        for piece in matrix.pieces:
            received[piece.rank].append((place, piece))
    return Exchange(tuple(map(tuple, sent)), tuple(map(tuple, received)), tuple(own))


def _swapped(outgoing: torch.Tensor, sizes: list[int], own_sizes: list[int]) -> torch.Tensor:
    """`sizes[r]` elements to each rank r, for `own_sizes[r]` from it."""
    incoming = outgoing.new_empty(sum(own_sizes))
    distributed.all_to_all_single(incoming, outgoing, own_sizes, sizes)
    return incoming
