"""Samples of one source: a stream of tokens as sequences of equal length, with the labels that follow them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dsllm.data.order import Integers
from dsllm.data.packing import PackingPlan
from dsllm.data.shards import TokenShards

IGNORED_LABEL = -100
"""The label of positions that no loss counts, as torch's cross-entropy has it."""


@dataclass(frozen=True)
class Rows:
    """Samples as they are read: int64, (samples, sequence_length) each."""

    inputs: Integers
    labels: Integers
    """`labels[:, t]` follows `inputs[:, t]`; -100 where nothing is to be predicted."""
    positions: Integers | None
    """Restart at 0 where a document begins; None where attention does not stop there."""


class Samples(Protocol):
    """Samples that are read in any order, each at the same cost."""

    sequence_length: int
    pads: bool
    """Whether a sample may have fewer labels than `sequence_length`."""

    def __len__(self) -> int:
        """Samples in all."""

    @property
    def padding_share(self) -> float:
        """Positions without a label, of all positions of all samples."""

    def read(self, ids: Integers) -> Rows:
        """The samples of these ids in `range(len(self))`, in this order."""

    def num_labels(self, ids: Integers) -> Integers:
        """Labels that count in each of these samples, found without reading any token; (len(ids),)."""


class ConcatenatedSamples:
    """The stream cut wherever a sequence ends: sample `i` reads from token `i * sequence_length` on, and one token more
    as its last label, so that every token but the first is predicted exactly once an epoch."""

    def __init__(
        self, shards: TokenShards, sequence_length: int, *, mask_documents: bool = False, pads: bool = False
    ) -> None:
        """What is left at the end of the stream makes a sample of its own where `pads`; otherwise it is left out."""
        self.sequence_length = sequence_length
        self.pads = pads
        self._shards = shards
        self._mask_documents = mask_documents
        self._end_of_text_id = shards.manifest.end_of_text_id

    def __len__(self) -> int:
        whole, rest = divmod(len(self._shards) - 1, self.sequence_length)
        return whole + (self.pads and rest > 0)

    @property
    def padding_share(self) -> float:
        return 1 - (len(self._shards) - 1) / (len(self) * self.sequence_length) if self.pads else 0.0

    def read(self, ids: Integers) -> Rows:
        tokens = np.empty((len(ids), self.sequence_length + 1), dtype=np.int64)
        for row, index in zip(tokens, ids.tolist(), strict=True):
            start = index * self.sequence_length
            present = min(len(row), len(self._shards) - start)
            self._shards.read_into(row[:present], start)
            row[present:] = self._end_of_text_id
        inputs, labels = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        if self.pads:
            labels[np.arange(self.sequence_length) >= self.num_labels(ids)[:, np.newaxis]] = IGNORED_LABEL
        # End-of-text ends a document and stands nowhere else; read as an input it predicts how the next one begins.
        positions = restarting_positions(inputs == self._end_of_text_id) if self._mask_documents else None
        return Rows(inputs, labels, positions)

    def num_labels(self, ids: Integers) -> Integers:
        return np.minimum(len(self._shards) - 1 - ids * self.sequence_length, self.sequence_length)


class PackedSamples:
    """The stream packed by a plan: every document that fits lies whole in a sample, and padding fills the rest.

    The first token of a piece is predicted from the token before it in the stream, which for a document's first is the
    end-of-text of another: nothing of that document itself can be seen. Every token is predicted exactly once an epoch.
    """

    pads = True

    def __init__(
        self, shards: TokenShards, plan: PackingPlan, sequence_length: int, *, mask_documents: bool = False
    ) -> None:
        self.sequence_length = sequence_length
        self.plan = plan
        self._shards = shards
        self._mask_documents = mask_documents
        self._end_of_text_id = shards.manifest.end_of_text_id

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def padding_share(self) -> float:
        return 1 - len(self._shards) / (len(self) * self.sequence_length)

    def read(self, ids: Integers) -> Rows:
        shape = len(ids), self.sequence_length
        inputs, labels = np.full(shape, self._end_of_text_id), np.full(shape, IGNORED_LABEL)
        begins = np.zeros(shape, dtype=np.bool_)
        tokens = np.empty(self.sequence_length + 1, dtype=np.int64)
        for row, sample in enumerate(ids.tolist()):
            column = 0
            for start, length in self.plan.pieces_of(sample):
                self._read_with_the_one_before(tokens[: length + 1], start)
                inputs[row, column : column + length] = tokens[:length]
                labels[row, column : column + length] = tokens[1 : length + 1]
                begins[row, column] = True
                column += length
            begins[row, column : column + 1] = True  # padding is nobody's document
        return Rows(inputs, labels, restarting_positions(begins) if self._mask_documents else None)

    def num_labels(self, ids: Integers) -> Integers:
        return self.plan.tokens[ids].astype(np.int64)

    def _read_with_the_one_before(self, tokens: Integers, start: int) -> None:
        """Fill `tokens` from the one before `start` on, which at the very beginning is an end-of-text too."""
        tokens[0] = self._end_of_text_id
        missing = int(start == 0)
        self._shards.read_into(tokens[missing:], start - 1 + missing)


def restarting_positions(begins: npt.NDArray[np.bool_]) -> Integers:
    """Positions that count from 0 in each row, and from 0 again wherever `begins`; same shape."""
    columns = np.arange(begins.shape[1])
    return columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
