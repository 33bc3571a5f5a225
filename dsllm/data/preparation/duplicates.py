"""Exact copies among documents, however many: their keys are compared a part at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsllm.data.preparation.piece_store import load_keys

_BLOCK_BYTES = 2**20
_KEYS_AT_ONCE = 2**23
"""Keys that are sorted together: about 400 MB with what sorting needs."""


class Copies:
    """Which documents repeat an earlier one. The marks, a byte for each document, lie in a file."""

    def __init__(self, pieces: Sequence[Path], marks_file: Path) -> None:
        """Compare all documents of the pieces (see piece_store.py); the first of several alike is no copy."""
        self._ends = np.cumsum([len(load_keys(piece)) for piece in pieces])
        num_documents = int(self._ends[-1]) if pieces else 0
        size_bytes = max(num_documents, 1)  # a file of no bytes cannot be mapped
        _write_zeros(marks_file, size_bytes)
        self._marks = np.memmap(marks_file, np.bool_, "r+", shape=size_bytes)
        num_parts = -(-num_documents // _KEYS_AT_ONCE)
        for part in range(num_parts):
            self._marks[_copies_in(pieces, part, num_parts)] = True

    def of(self, index: int) -> npt.NDArray[np.bool_]:
        """The marks of the documents that begin in the piece of that index."""
        start = self._ends[index - 1] if index else 0
        return np.array(self._marks[start : self._ends[index]])


def _write_zeros(file: Path, size_bytes: int) -> None:
    """Written out, because a map of a file with holes dies of a full disk where a write tells of it."""
    with file.open("wb") as zeros:
        for start in range(0, size_bytes, _BLOCK_BYTES):
            zeros.write(bytes(min(_BLOCK_BYTES, size_bytes - start)))


def _copies_in(pieces: Sequence[Path], part: int, num_parts: int) -> npt.NDArray[np.int64]:
    """Positions, among all documents, of copies whose keys fall into the part."""
    keys, positions, offset = [], [], 0
    for piece in pieces:
        # Two numbers for a key: numpy sorts them much faster than bytes.
        numbers = load_keys(piece).view("<u8")
        chosen = np.flatnonzero(numbers[:, 0] % np.uint64(num_parts) == part)
        keys.append(numbers[chosen])
        positions.append(chosen + offset)
        offset += len(numbers)
    high, low = np.concatenate(keys).T
    position = np.concatenate(positions)
    order = np.lexsort((position, low, high))
    is_repeated = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
    copies: npt.NDArray[np.int64] = position[order[1:][is_repeated]]
    return copies
