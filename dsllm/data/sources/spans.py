"""Sources that are files: each is cut in spans, and neighbouring spans make a piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dsllm.data.sources.files import FoundFile
from dsllm.data.sources.piece import Document, Dropped, Recall, State


@dataclass(frozen=True, slots=True)
class Part:
    """Where a span stands in the one long document that it is a part of."""

    begins: bool
    ends: bool
    document_start: int
    """Of the document, in its file."""
    whole_key: bytes
    whole_characters: int
    whole_is_blank: bool


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one file: bytes, after unpacking, or rows; whole documents, or a part of a long one."""

    file: FoundFile
    start: int
    stop: int
    text_bytes: int
    """Text in it, about: pieces are filled by this."""
    size_bytes: int
    """Its share of the file's size."""
    carried: Any = None
    """What is in it, where the file can only be read in order: the process that cuts it has just read it."""
    part: Part | None = None


class SpanReader(Protocol):
    """A kind of file. Picklable."""

    @property
    def piece_bytes(self) -> int:
        """Text that a piece holds, about."""

    def is_read_to_cut(self, file: FoundFile) -> bool:
        """Whether cutting the file takes reading it, so that stored pieces are better passed over."""

    def spans(self, file: FoundFile) -> Iterator[Span]:
        """The file's spans in order, none much larger than a piece where it can be cut."""

    def documents(self, span: Span, dropped: Dropped) -> Iterator[Document]:
        """The documents of a span of `spans`, in any process."""


@dataclass(frozen=True)
class FilePiece:
    """Neighbouring spans, of one file or of several small ones."""

    name: str
    stamp: str
    size_bytes: int
    state: State | None
    reader: SpanReader
    spans: tuple[Span, ...] | None
    """None for a piece that was recalled: it is never read."""

    def documents(self, dropped: Dropped) -> Iterator[Document]:
        """The documents of all spans."""
        assert self.spans is not None, "a recalled piece has no input"
        for span in self.spans:
            yield from self.reader.documents(span, dropped)


@dataclass(frozen=True)
class _Place:
    """Where a piece begins: a file by its number, and a position in it."""

    file: int = 0
    start: int = 0


@dataclass
class FileSource:
    """Files, one after the other, in pieces that do not depend on where the reading begins."""

    files: Sequence[FoundFile]
    reader: SpanReader
    size_bytes: int = field(init=False)
    stamp: str = field(init=False)
    _numbers: dict[str, int] = field(init=False)
    _gives_states: bool = field(init=False)

    def __post_init__(self) -> None:
        self.size_bytes = sum(file.size_bytes for file in self.files)
        self.stamp = self._stamp(_Place(), None)
        self._numbers = {file.name: number for number, file in enumerate(self.files)}
        self._gives_states = any(self.reader.is_read_to_cut(file) for file in self.files)

    def pieces(self, recall: Recall) -> Iterator[FilePiece]:
        """Pieces of all files; those that `recall` knows from the first on are not cut again."""
        index = 0
        place: _Place | None = _Place()
        while place and (piece := self._recalled(place, index, recall)):
            assert piece.state is not None
            yield piece
            index, place = index + 1, self._next_place(piece.state)
        if place:
            yield from self._cut(place, index)

    def _recalled(self, place: _Place, index: int, recall: Recall) -> FilePiece | None:
        """The piece at the place as an earlier pass left it; None where there is none, or the files have changed."""
        name = self._name(place)
        state = recall(name) if self._gives_states else None
        if not state or state["index"] != index or (state["next"] and state["next"][0] not in self._numbers):
            return None
        if state["stamp"] != self._stamp(place, self._next_place(state)):
            return None
        return FilePiece(name, state["stamp"], state["size_bytes"], state, self.reader, None)

    def _cut(self, place: _Place, index: int) -> Iterator[FilePiece]:
        """The pieces from a place on."""
        group: list[Span] = []
        group_bytes = 0
        for number, span in self._spans(place):
            if group and group_bytes + span.text_bytes > self.reader.piece_bytes:
                next_place = _Place(number, span.start)
                yield self._piece(place, next_place, index, group)
                place, index, group, group_bytes = next_place, index + 1, [], 0
            group.append(span)
            group_bytes += span.text_bytes
        if group:
            yield self._piece(place, None, index, group)

    def _spans(self, place: _Place) -> Iterator[tuple[int, Span]]:
        for number in range(place.file, len(self.files)):
            for span in self.reader.spans(self.files[number]):
                if number > place.file or span.start >= place.start:
                    yield number, span

    def _piece(self, place: _Place, next_place: _Place | None, index: int, group: list[Span]) -> FilePiece:
        name, stamp = self._name(place), self._stamp(place, next_place)
        size_bytes = sum(span.size_bytes for span in group)
        state: State | None = None
        if self._gives_states:
            after = [self.files[next_place.file].name, next_place.start] if next_place else None
            state = {"index": index, "stamp": stamp, "size_bytes": size_bytes, "next": after}
        return FilePiece(name, stamp, size_bytes, state, self.reader, tuple(group))

    def _name(self, place: _Place) -> str:
        return f"{self.files[place.file].name}:{place.start}"

    def _next_place(self, state: State) -> _Place | None:
        return _Place(self._numbers[state["next"][0]], state["next"][1]) if state["next"] else None

    def _stamp(self, place: _Place, next_place: _Place | None) -> str:
        """Of all files from the one where a piece begins to the one behind it: none came between them since.

        And of where it ends, and how large pieces are: those behind it fit no others.
        """
        last = next_place.file if next_place else len(self.files) - 1
        members = "\n".join(f"{file.name}\n{file.stamp}" for file in self.files[place.file : last + 1])
        end = next_place.start if next_place else None
        return hashlib.blake2b(f"{self.reader.piece_bytes}\n{end}\n{members}".encode(), digest_size=16).hexdigest()
