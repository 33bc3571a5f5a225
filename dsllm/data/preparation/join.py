"""Encoded pieces, in the order of their sources, become the streams of token shards.

What is joined is noted down from time to time, after it is safely on the disk: preparation that is killed goes on from
there, and pieces that are noted down are no longer needed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import Field

from dsllm.data.held_out import are_held_out
from dsllm.data.preparation.piece_store import EncodedPiece, PieceFile, load_piece
from dsllm.data.preparation.shard_writer import ShardWriter, WrittenSoFar
from dsllm.data.shards import Record, SourceRecord, Split, Tokens, token_dtype, write_durably
from dsllm.data.sources.piece import State

STATE_FILE = "joined.json"
LOG_FILE = "joined.jsonl"
_PIECES_BETWEEN_NOTES = 64

SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclass(frozen=True)
class Routing:
    """Where documents go."""

    labels: tuple[str, ...]
    """Of all sources, in the order of the spec."""
    validated_labels: frozenset[str]
    """Sources that are only validated on."""
    threshold: int
    """Documents of the other sources whose key is below it are held out."""
    vocab_size: int
    shard_tokens: int


class SourceCounts(Record):
    """What of a source is joined."""

    documents: int = 0
    text_bytes: int = 0
    dropped: dict[str, int] = Field(default_factory=dict)
    last_is_copy: bool = False
    """Whether the last document, which may go on in the next piece, is left out."""


class _Noted(Record):
    """The state of a joiner on the disk."""

    pieces: int = 0
    counts: dict[str, SourceCounts] = Field(default_factory=dict)
    streams: dict[str, WrittenSoFar] = Field(default_factory=dict)


class JoinedPiece(Record):
    """A piece that is joined: its source, its name, the stamp of its input, where its stream stood behind it."""

    label: str
    name: str
    stamp: str
    state: State | None

    def is_of(self, file: PieceFile) -> bool:
        """Whether it is what now lies in its place."""
        return (self.label, self.name, self.stamp) == (file.label, file.name, file.stamp)


class Joiner:
    """Appends pieces to the streams. A context manager: leaving it closes the files, finished or not."""

    def __init__(self, directory: Path, routing: Routing) -> None:
        """Go on with what an earlier joiner noted down in `directory`, or begin."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._routing = routing
        noted = _read_noted(directory / STATE_FILE)
        self.joined = _read_log(directory / LOG_FILE, noted.pieces)
        self._log: BinaryIO = (directory / LOG_FILE).open("ab")
        self._counts = {label: noted.counts.get(label, SourceCounts()) for label in routing.labels}
        self._writers = {
            (label, split): self._writer(f"{label}-{split}", noted)
            for label in routing.labels
            for split in SPLITS
            if split == "validation" or label not in routing.validated_labels
        }
        self._unnoted: list[PieceFile] = []

    def __enter__(self) -> Joiner:
        return self

    def __exit__(self, *exception: object) -> None:
        with ExitStack() as stack:
            stack.callback(self._log.close)
            for writer in self._writers.values():
                stack.push(writer)

    def add(self, file: PieceFile, is_copy: npt.NDArray[np.bool_] | None = None, *, keep: bool = False) -> None:
        """Append a piece. `is_copy` marks the documents that begin in it and are left out; none when None.

        Its file is deleted once that cannot be undone, unless it is to be kept. Raises BadPieceError.
        """
        piece = load_piece(file.path)
        leaves_out = self._left_out(file.label, piece, is_copy)
        for split, tokens, starts in self._runs(file.label, piece, leaves_out):
            self._writers[file.label, split].write(tokens, starts)
        self._count(file.label, piece, leaves_out)
        self._note_piece(JoinedPiece(label=file.label, name=file.name, stamp=file.stamp, state=piece.state))
        if not keep:
            self._unnoted.append(file)
        if len(self.joined) % _PIECES_BETWEEN_NOTES == 0:
            self._note_down()

    def finish(self, descriptions: Sequence[str]) -> tuple[SourceRecord, ...]:
        """Close all shards; what each source gave, in the order of the labels."""
        self._note_down()
        return tuple(
            SourceRecord(
                label=label,
                source=description,
                documents=self._counts[label].documents,
                text_bytes=self._counts[label].text_bytes,
                dropped=self._counts[label].dropped,
                streams={
                    split: record
                    for split in SPLITS
                    if (label, split) in self._writers and (record := self._writers[label, split].finish()).tokens
                },
            )
            for label, description in zip(self._routing.labels, descriptions, strict=True)
        )

    def counts(self, label: str) -> SourceCounts:
        return self._counts[label]

    def _writer(self, name: str, noted: _Noted) -> ShardWriter:
        dtype = token_dtype(self._routing.vocab_size)
        after = noted.streams.get(name, WrittenSoFar())
        return ShardWriter(self._directory, name, dtype, self._routing.shard_tokens, after)

    def _left_out(
        self, label: str, piece: EncodedPiece, is_copy: npt.NDArray[np.bool_] | None
    ) -> npt.NDArray[np.bool_]:
        """Which stretches are left out: all those of a document that is a copy."""
        copies = np.zeros(piece.num_documents, np.bool_) if is_copy is None else is_copy
        # The first stretch may belong to the last document of the piece before.
        return np.concatenate([[self._counts[label].last_is_copy], copies])[np.cumsum(piece.begins)]

    def _runs(
        self, label: str, piece: EncodedPiece, leaves_out: npt.NDArray[np.bool_]
    ) -> Iterator[tuple[Split, Tokens, list[int]]]:
        """Neighbouring stretches that go to the same split: their tokens, and where in them documents begin."""
        if label in self._routing.validated_labels:
            is_held_out = np.ones(len(piece.starts), np.bool_)
        else:
            is_held_out = are_held_out(piece.keys, self._routing.threshold)
        way = np.where(leaves_out, -1, is_held_out)
        bounds = [0, *(np.flatnonzero(np.diff(way)) + 1).tolist(), len(way)] if len(way) else [0]
        token_bounds = np.append(piece.starts, len(piece.tokens))
        for first, end in pairwise(bounds):
            if way[first] >= 0:
                start = token_bounds[first]
                starts = piece.starts[first:end][piece.begins[first:end]] - start
                yield SPLITS[way[first]], piece.tokens[start : token_bounds[end]], starts

    def _count(self, label: str, piece: EncodedPiece, leaves_out: npt.NDArray[np.bool_]) -> None:
        counts = self._counts[label]
        num_copies = int((leaves_out & piece.begins).sum())
        dropped = Counter(counts.dropped) + Counter(piece.dropped) + Counter({"duplicate": num_copies})
        self._counts[label] = SourceCounts(
            documents=counts.documents + piece.num_documents - num_copies,
            text_bytes=counts.text_bytes + int(piece.text_bytes[~leaves_out].sum()),
            dropped=dict(sorted(dropped.items())),
            last_is_copy=bool(leaves_out[-1]) if len(leaves_out) else counts.last_is_copy,
        )

    def _note_piece(self, piece: JoinedPiece) -> None:
        self.joined.append(piece)
        self._log.write(piece.model_dump_json().encode() + b"\n")

    def _note_down(self) -> None:
        """Note what is joined, and delete the pieces that are."""
        streams = {f"{label}-{split}": writer.so_far() for (label, split), writer in self._writers.items()}
        self._log.flush()
        os.fsync(self._log.fileno())
        noted = _Noted(pieces=len(self.joined), counts=self._counts, streams=streams)
        temporary = self._directory / f"{STATE_FILE}.tmp"
        write_durably(temporary, noted.model_dump_json().encode())
        os.replace(temporary, self._directory / STATE_FILE)
        for file in self._unnoted:
            file.path.unlink(missing_ok=True)
        self._unnoted = []


def _read_noted(path: Path) -> _Noted:
    return _Noted.model_validate_json(path.read_bytes()) if path.is_file() else _Noted()


def _read_log(path: Path, num_pieces: int) -> list[JoinedPiece]:
    """The first `num_pieces` lines; what was written after them is cut off."""
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)[:num_pieces]
    with path.open("r+b") as file:
        file.truncate(sum(map(len, lines)))
    return [JoinedPiece(**json.loads(line)) for line in lines]
