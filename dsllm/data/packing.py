"""Best-fit packing: documents into sequences, none of them cut that fits (Ding et al., arXiv:2404.10830).

Documents longer than a sequence are cut into whole sequences and a rest. Pieces are packed in the order of falling
length, each into the sequence with the least room that still holds it; equal lengths and equal rooms are counted
together, so that ten million documents take ten seconds, and 50 bytes for each piece while it lasts. The plan depends
on the documents' lengths alone. It is made once and kept beside the shards in one file, which is memory-mapped; opening
it checks its SHA-256, a tenth of a second for ten million documents.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsllm.data.order import Integers
from dsllm.data.shards import TokenShards

logger = logging.getLogger(__name__)

_SUFFIX = ".plan"
_MAGIC = b"dsllm packing 2\n"
_DIGEST_BYTES = 32
_HASHED_FROM = len(_MAGIC) + _DIGEST_BYTES
"""The SHA-256 in a file is that of all that follows it."""
_COUNTS = np.dtype([("sequences", "<i8"), ("pieces", "<i8")])
_ARRAYS_FROM = _HASHED_FROM + _COUNTS.itemsize
_Placed = tuple[int, int, int]
"""The first sequence of a run, its sequences, and the pieces that each of them got."""
_PIECE = np.dtype([("start", "<i8"), ("length", "<i4")])


@dataclass(frozen=True)
class PackingPlan:
    """Which pieces of the stream make each sequence. Sequences come in the order of their first pieces."""

    firsts: Integers
    """Of each sequence its first piece, and at the end the number of pieces; (sequences + 1,)."""
    pieces: npt.NDArray[np.void]
    """`start` in the stream and `length`, in tokens, of each piece; those of a sequence in the order of the stream."""
    tokens: npt.NDArray[np.integer[Any]]
    """In each sequence, which padding fills up. It follows from the pieces, but the tokens of a batch are counted in
    every step, from anywhere."""

    def __len__(self) -> int:
        return len(self.tokens)

    def pieces_of(self, sequence: int) -> list[tuple[int, int]]:
        """Start and length of each piece of the sequence."""
        first, end = self.firsts[sequence : sequence + 2].tolist()
        pieces: list[tuple[int, int]] = self.pieces[first:end].tolist()
        return pieces


def open_plan(shards: TokenShards, sequence_length: int) -> PackingPlan:
    """The plan of a stream, mapped from its file, which is made where it is missing, and made again where damaged.

    Where the folder cannot be written the plan stays in this process's memory, and every process makes its own.
    """
    path = shards.directory / _file_name(shards, sequence_length)
    plan = _read(path, sequence_length)
    if plan is None:
        plan = pack(shards.document_starts(), len(shards), sequence_length)
        try:
            _write(path, plan)
        except OSError as error:
            logger.info("%s: cannot be written (%s); every process packs for itself", path, error.strerror)
    return _read(path, sequence_length) or plan


def pack(document_starts: Integers, num_tokens: int, sequence_length: int) -> PackingPlan:
    """The plan for documents that begin at these positions of a stream of `num_tokens`, each ending with the next."""
    starts, lengths = _cut(document_starts, num_tokens, sequence_length)
    sequences = _best_fit(lengths, sequence_length)
    _renumber(sequences)
    order = np.argsort(sequences, kind="stable")
    firsts = np.concatenate([[0], np.cumsum(np.bincount(sequences))])
    pieces = np.empty(len(order), dtype=_PIECE)
    pieces["start"], pieces["length"] = starts[order], lengths[order]
    tokens = np.add.reduceat(pieces["length"], firsts[:-1])
    return PackingPlan(firsts, pieces, tokens.astype(_tokens_dtype(sequence_length)))


def _cut(document_starts: Integers, num_tokens: int, sequence_length: int) -> tuple[Integers, Integers]:
    """Starts and lengths of the pieces, in the order of the stream; of a long document its whole sequences first."""
    ends = np.append(document_starts[1:], num_tokens)
    counts = -(-(ends - document_starts) // sequence_length)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(document_starts, counts) + (np.arange(len(before)) - before) * sequence_length
    return starts, np.minimum(np.repeat(ends, counts) - starts, sequence_length)


def _best_fit(lengths: Integers, sequence_length: int) -> Integers:
    """The sequence that each piece goes into, by best-fit decreasing.

    Pieces of one length and runs of neighbouring sequences with the same room are handled at once: into each sequence
    of such a run go as many of the pieces as fit, which is what one after the other would do too, because the sequence
    that got the last piece has less room than any other.
    """
    rooms = _Rooms(sequence_length)
    placed: list[_Placed] = []
    counts = np.bincount(lengths, minlength=sequence_length + 1).tolist()
    for length in range(sequence_length, 0, -1):
        pieces = counts[length]
        while pieces:
            for one in _place(rooms, length, pieces):
                placed.append(one)
                pieces -= one[1] * one[2]
    sequences = np.empty(len(lengths), dtype=np.int64)
    sequences[np.argsort(-lengths, kind="stable")] = _spread(placed)
    return sequences


def _place(rooms: _Rooms, length: int, pieces: int) -> Iterator[_Placed]:
    """Put some of the `pieces` of one length into the run of sequences that suits them best, and then the sequences
    back by the room that they have left."""
    room, first, available = rooms.take_smallest(length) or rooms.new(length, pieces)
    each = room // length
    full = min(available, pieces // each)
    if full:
        rooms.put(room - each * length, first, full)
        yield first, full, each
    rest = pieces - full * each if full < available else 0  # fewer than `each`: the last ones go into one more
    if rest:
        rooms.put(room - rest * length, first + full, 1)
        yield first + full, 1, rest
    used = full + (rest > 0)
    rooms.put(room, first + used, available - used)


class _Rooms:
    """Sequences by the room left in them, as runs of neighbours."""

    def __init__(self, sequence_length: int) -> None:
        self._sequence_length = sequence_length
        self._runs: list[list[tuple[int, int]]] = [[] for _ in range(sequence_length + 1)]
        self._num_sequences = 0
        self._occupied = 0  # bit r is set where there are sequences with room r: finding the next one is one shift

    def new(self, length: int, pieces: int) -> tuple[int, int, int]:
        """A run of empty sequences, as many as pieces of that length need."""
        number = -(-pieces // (self._sequence_length // length))
        self._num_sequences += number
        return self._sequence_length, self._num_sequences - number, number

    def put(self, room: int, first: int, number: int) -> None:
        if room and number:
            self._runs[room].append((first, number))
            self._occupied |= 1 << room

    def take_smallest(self, least: int) -> tuple[int, int, int] | None:
        """Room, first sequence and number of a run with the smallest room of at least `least`; None without any."""
        fitting = self._occupied >> least
        if not fitting:
            return None
        room = least + (fitting & -fitting).bit_length() - 1
        first, number = self._runs[room].pop()
        if not self._runs[room]:
            self._occupied ^= 1 << room
        return room, first, number


def _spread(placed: list[_Placed]) -> Integers:
    """The sequence of each piece, in the order of placing."""
    firsts, numbers, shares = np.array(placed, dtype=np.int64).reshape(-1, 3).T
    sizes = numbers * shares
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(firsts, sizes) + within // np.repeat(shares, sizes)


def _renumber(sequences: Integers) -> None:
    """Number sequences by their first piece in the stream, in place: so the first ones are no longer the fullest."""
    first_pieces = np.empty(int(sequences.max()) + 1, dtype=np.int64)
    first_pieces[sequences[::-1]] = np.arange(len(sequences))[::-1]  # of several writes the last one stays
    numbers = np.empty_like(first_pieces)
    numbers[np.argsort(first_pieces)] = np.arange(len(first_pieces))
    sequences[:] = numbers[sequences]


def _file_name(shards: TokenShards, sequence_length: int) -> str:
    """Holds a hash of the stream's own checksums, so that a plan of other data is never taken for this one's."""
    files = "".join(f"{shard.tokens} {shard.index_sha256}\n" for shard in shards.stream.shards)
    stream = hashlib.sha256(files.encode()).hexdigest()[:16]
    return f"{shards.label}-{shards.split}-packed-{sequence_length}-{stream}{_SUFFIX}"


def _tokens_dtype(sequence_length: int) -> np.dtype[np.integer[Any]]:
    return np.dtype("<u2" if sequence_length < 2**16 else "<i4")


def _read(path: Path, sequence_length: int) -> PackingPlan | None:
    """The plan in a file, mapped; None where there is none, or one that is not as it was written."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: the file is empty
        return None
    if not _is_intact(mapped):
        return None
    sequences, pieces = np.frombuffer(mapped, _COUNTS, 1, _HASHED_FROM)[0].tolist()
    dtypes = np.dtype("<i8"), _PIECE, _tokens_dtype(sequence_length)
    counts = sequences + 1, pieces, sequences
    sizes = [count * dtype.itemsize for count, dtype in zip(counts, dtypes, strict=True)]
    offsets = itertools.accumulate(sizes[:-1], initial=_ARRAYS_FROM)
    arrays: list[Any] = [np.frombuffer(mapped, *part) for part in zip(dtypes, counts, offsets, strict=True)]
    return PackingPlan(*arrays)


def _is_intact(mapped: mmap.mmap) -> bool:
    """Whether the whole file is as it was written."""
    if len(mapped) < _ARRAYS_FROM or mapped[: len(_MAGIC)] != _MAGIC:
        return False
    with memoryview(mapped) as content:
        return hashlib.sha256(content[_HASHED_FROM:]).digest() == mapped[len(_MAGIC) : _HASHED_FROM]


def _write(path: Path, plan: PackingPlan) -> None:
    """Whole or not at all; of several processes that write at once the last one wins, with the same bytes."""
    _remove_leftovers(path.parent)
    counts = np.array([(len(plan), len(plan.pieces))], _COUNTS)
    arrays = [counts, plan.firsts.astype("<i8"), plan.pieces, plan.tokens]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # says to others that it is no leftover
            file.writelines([_MAGIC, digest.digest(), *arrays])
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are for their owner alone
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _remove_leftovers(folder: Path) -> None:
    """Delete what processes that were killed while they wrote a plan have left: files that nobody holds locked."""
    for leftover in folder.glob(f".*{_SUFFIX}.*"):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
