"""Mixing by weight: which source gives sample `i` of the run, and which of its samples that is.

Both are pure functions of the weights and `i`, and any position costs the same. The sources take turns so evenly that
their counts follow their shares through every prefix of the run, not only on average:

- Shares over a common denominator up to 131,072, such as weights of five decimals that sum to 1, repeat with that
  period. One period is a solution of the chairman assignment problem (Tijdeman, Discrete Mathematics 32, 1980): with K
  sources no count is ever further than 1 - 1/(2K - 2) from its share.
- Other shares are drawn down a binary tree of the sources, which needs no table: each fork sends samples left and right
  within half a sample of the branches' shares. Of a source of weight w below branches of weights W1, W2, ... no count
  is further than (1 + w/W1 + w/W2 + ...) / 2 from its share. In a Huffman tree those weights grow at least like the
  Fibonacci numbers w, 2w, 3w, 5w, ..., so that this is below 1.68 for any weights, and below 1 for up to three sources.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dsllm.data.order import Integers, sample_ids, source_seed

LONGEST_PERIOD = 2**17
"""Samples in a table at most: a fifth of a second to make, and 1.5 MiB."""


@dataclass(frozen=True)
class MixedSource:
    """A source as a mix sees it."""

    label: str
    samples: int
    weight: float | None
    """Its share relative to the other weights; None in all for a pool by size."""
    padding_share: float = 0.0
    """Of the positions of its samples."""


@dataclass(frozen=True)
class SourceUse:
    """What a run takes from a source."""

    label: str
    share: float
    """Of the run's samples."""
    samples: int
    """That it has."""
    draws: int
    """That the run reads, repetitions counted."""
    padding_share: float
    """Of the positions of its samples."""

    @property
    def epochs(self) -> float:
        """How often the run sees each of its samples, on average."""
        return self.draws / self.samples if self.samples else 0.0

    def sentence(self) -> str:
        """`source 'news': 51.0% of the run's samples, 2.35 epochs of its 81,920`."""
        padding = f"; {self.padding_share:.2%} of their positions are padding" if self.padding_share else ""
        return (
            f"source {self.label!r}: {self.share:.1%} of the run's samples, {format_epochs(self.epochs)} epochs of its "
            f"{self.samples:,}{padding}"
        )


@dataclass(frozen=True)
class Drawn:
    """Which samples some places of the run hold; (places,) each."""

    sources: Integers
    """Index of the source in the mixture."""
    samples: Integers
    """In that source."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, places: slice | npt.NDArray[np.bool_]) -> Drawn:
        return Drawn(self.sources[places], self.samples[places])


class Mixture:
    """The order of a run over its sources.

    Without weights all samples are one pool: each of them is read once an epoch, whichever source it is from. With
    weights every source is shuffled by itself, again in each of its own epochs.
    """

    def __init__(self, sources: Sequence[MixedSource], seed: int) -> None:
        assert any(source.samples and source.weight != 0 for source in sources), "a mix needs samples"
        self.sources = tuple(sources)
        self._seed = seed
        self._ends = np.cumsum([source.samples for source in sources])
        self._drawn = [index for index, source in enumerate(sources) if source.weight]
        self._turns = turns([sources[index].weight or 0 for index in self._drawn]) if len(self._drawn) > 1 else None

    def draw(self, run_samples: npt.ArrayLike) -> Drawn:
        """What these samples of the run are, by their numbers from 0 on. Many cost little more than one."""
        positions = np.atleast_1d(np.asarray(run_samples, dtype=np.int64))
        if self._turns is None:
            return self._draw_from_pool(positions)
        places, draws = self._turns.draw(positions)
        samples = np.empty_like(draws)
        for place in np.unique(places):
            source = self.sources[self._drawn[place]]
            own = places == place
            samples[own] = sample_ids(source_seed(self._seed, source.label), source.samples, draws[own])
        return Drawn(np.asarray(self._drawn)[places], samples)

    def uses(self, num_samples: int) -> list[SourceUse]:
        """What the first `num_samples` samples of the run take from each source.

        Of a pool's last epoch, which may be a part of one, each source is taken to give its share.
        """
        draws = self._draws(num_samples)
        total = sum(source.weight or 0 for source in self.sources)
        return [
            SourceUse(
                label=source.label,
                share=(source.weight or 0) / total if total else source.samples / int(self._ends[-1]),
                samples=source.samples,
                draws=number,
                padding_share=source.padding_share,
            )
            for source, number in zip(self.sources, draws, strict=True)
        ]

    def _draw_from_pool(self, positions: Integers) -> Drawn:
        """Of all sources one after the other, or of the only one that has a weight."""
        if self._drawn:
            source = self._drawn[0]
            samples = sample_ids(self._seed, self.sources[source].samples, positions)
            return Drawn(np.full_like(samples, source), samples)
        samples = sample_ids(self._seed, int(self._ends[-1]), positions)
        sources = np.searchsorted(self._ends, samples, side="right")
        return Drawn(sources, samples - (self._ends - [source.samples for source in self.sources])[sources])

    def _draws(self, num_samples: int) -> list[int]:
        if not self._drawn:
            return [round(Fraction(num_samples * source.samples, int(self._ends[-1]))) for source in self.sources]
        counts = [num_samples] if self._turns is None else self._turns.counts(num_samples)
        by_source = dict(zip(self._drawn, counts, strict=True))
        return [by_source.get(index, 0) for index in range(len(self.sources))]


def format_epochs(epochs: float) -> str:
    """`0.0123`, `8.57`, `1,300`."""
    return f"{epochs:.3g}" if epochs < 1000 else f"{epochs:,.0f}"


def repeated_too_often(uses: Sequence[SourceUse], max_epochs: float) -> list[str]:
    """A sentence for each source that the run sees more often than `max_epochs` times."""
    return [
        f"source {use.label!r}: the run sees it {format_epochs(use.epochs)} times, more than data.max_epochs = "
        f"{max_epochs:g}; add text to it, lower its weight, or shorten the run"
        for use in uses
        if use.epochs > max_epochs
    ]


class Turns(Protocol):
    """Who gives the samples of a run, of several that have shares."""

    def draw(self, positions: Integers) -> tuple[Integers, Integers]:
        """Whose turn each position is, and how many turns that one had before."""

    def counts(self, positions: int) -> list[int]:
        """How many turns each has in the first `positions`."""


def turns(weights: Sequence[float]) -> Turns:
    """Turns in proportion to two or more weights above 0, taken as the decimal numbers that they are written as."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    total = math.lcm(*(share.denominator for share in shares))
    numerators = [int(share * total) for share in shares]
    return PeriodicTurns(numerators) if total <= LONGEST_PERIOD else TreeTurns(numerators)


class PeriodicTurns:
    """A table of one period, `sum(numerators)` positions long, in which each has `numerators[k]` turns."""

    def __init__(self, numerators: Sequence[int]) -> None:
        self._numerators = np.array(numerators, dtype=np.int64)
        self._table = _chairmen(numerators)
        # The turns that the same one had before, within the period.
        self._before = np.empty(len(self._table), dtype=np.int32)
        for index, turns_of_it in enumerate(numerators):
            self._before[self._table == index] = np.arange(turns_of_it)

    def draw(self, positions: Integers) -> tuple[Integers, Integers]:
        periods, places = np.divmod(positions, len(self._table))
        owners = self._table[places]
        return owners, periods * self._numerators[owners] + self._before[places]

    def counts(self, positions: int) -> list[int]:
        periods, rest = divmod(positions, len(self._table))
        in_rest = np.bincount(self._table[:rest], minlength=len(self._numerators))
        return [int(count) for count in periods * self._numerators + in_rest]


def _chairmen(numerators: Sequence[int]) -> Integers:
    """Whose turn each position of a period is.

    With s = 2K - 2, the count of a share a/D stays within 1 - 1/s of it exactly when turn j (from 0) comes in the
    positions (from 1) from ceil(D(sj + 1) / as) to floor(D(sj + s - 1) / as) + 1. Tijdeman proved that all turns can
    keep such windows; taking the earliest deadline of those that may come then keeps them.
    """
    total, slack = sum(numerators), 2 * len(numerators) - 2
    turns_of = [np.arange(number, dtype=np.int64) for number in numerators]
    parts = [number * slack for number in numerators]
    firsts = np.concatenate([-(-total * (slack * j + 1) // part) for j, part in zip(turns_of, parts, strict=True)])
    lasts = np.concatenate([total * (slack * (j + 1) - 1) // part + 1 for j, part in zip(turns_of, parts, strict=True)])
    owners = np.repeat(np.arange(len(numerators)), numerators)
    by_first = np.argsort(firsts, kind="stable")
    waiting = list(zip(firsts[by_first].tolist(), lasts[by_first].tolist(), owners[by_first].tolist(), strict=True))
    table = np.empty(total, dtype=np.int64)
    ready: list[tuple[int, int]] = []
    coming = 0
    for position in range(1, total + 1):
        while coming < total and waiting[coming][0] <= position:
            heapq.heappush(ready, waiting[coming][1:])
            coming += 1
        deadline, table[position - 1] = heapq.heappop(ready)
        assert deadline >= position, "a turn came too late"
    return table


class TreeTurns:
    """Turns by a Huffman tree, in exact arithmetic of Python's own integers: there are no limits to the weights."""

    def __init__(self, numerators: Sequence[int]) -> None:
        self._num_owners = len(numerators)
        self._root = _huffman(numerators)

    def draw(self, positions: Integers) -> tuple[Integers, Integers]:
        owners, draws = np.empty_like(positions), np.empty_like(positions)
        _send_down(self._root, positions.astype(object), np.arange(len(positions)), owners, draws)
        return owners, draws

    def counts(self, positions: int) -> list[int]:
        counts = [0] * self._num_owners
        _count_down(self._root, positions, counts)
        return counts


@dataclass(frozen=True)
class _Fork:
    """Two branches that share the samples sent here in proportion to their weights. The end of a branch is an owner."""

    left: _Branch
    right: _Branch
    left_weight: int
    weight: int

    def to_left(self, positions: _Count) -> _Count:
        """How many of the first `positions` samples go left: the nearest whole number to its share of them."""
        return (2 * self.left_weight * positions + self.weight) // (2 * self.weight)


_Branch = _Fork | int
_Objects = npt.NDArray[np.object_]
_Count = TypeVar("_Count", int, _Objects)


def _huffman(numerators: Sequence[int]) -> _Branch:
    ages = itertools.count()  # decide between equal weights, so that branches are never compared
    heap: list[tuple[int, int, _Branch]] = [(weight, next(ages), owner) for owner, weight in enumerate(numerators)]
    heapq.heapify(heap)
    while len(heap) > 1:
        left_weight, _, left = heapq.heappop(heap)
        right_weight, _, right = heapq.heappop(heap)
        weight = left_weight + right_weight
        heapq.heappush(heap, (weight, next(ages), _Fork(left, right, left_weight, weight)))
    return heap[0][2]


def _send_down(branch: _Branch, positions: _Objects, where: Integers, owners: Integers, draws: Integers) -> None:
    """Write the owner and the draw of each position at its place in `where`."""
    if isinstance(branch, int):
        owners[where], draws[where] = branch, positions
        return
    before = branch.to_left(positions)
    goes_left = (branch.to_left(positions + 1) > before).astype(bool)
    _send_down(branch.left, before[goes_left], where[goes_left], owners, draws)
    _send_down(branch.right, (positions - before)[~goes_left], where[~goes_left], owners, draws)


def _count_down(branch: _Branch, positions: int, counts: list[int]) -> None:
    if isinstance(branch, int):
        counts[branch] = positions
        return
    to_left = branch.to_left(positions)
    _count_down(branch.left, to_left, counts)
    _count_down(branch.right, positions - to_left, counts)
