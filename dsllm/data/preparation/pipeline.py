"""Sources to encoded pieces: every piece that is not yet there is made, and all are handed on in order."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsllm.data.preparation.encode import Done, Encode, Encoding, Task
from dsllm.data.preparation.join import JoinedPiece
from dsllm.data.preparation.piece_store import PieceFile, load_states
from dsllm.data.sources.piece import OpenSource, Recall, State


@dataclass(frozen=True)
class Progress:
    """How far preparation has come. All zero while the tokenizer is being made."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    done_bytes: int = 0
    """Input that is done, earlier attempts' share included, as the sources measure it."""
    total_bytes: int | None = None
    """All input; None where nobody knows."""
    found_bytes: int = 0
    """Of `done_bytes`, what earlier attempts had done."""


@dataclass(frozen=True)
class Part:
    """The pieces that one of several machines makes: every `of`-th, from the `number`-th on; numbers start at 1."""

    number: int = 1
    of: int = 1

    def holds(self, position: int) -> bool:
        """Whether the piece at that position, among all pieces of all sources, is one of them."""
        return position % self.of == self.number - 1


class InputChangedError(Exception):
    """A source's input is no longer what an earlier attempt has joined."""


def size_of(sources: Mapping[str, OpenSource]) -> int | None:
    """Input of all sources in bytes; None where one does not know."""
    sizes = [source.size_bytes for source in sources.values()]
    return None if None in sizes else sum(size or 0 for size in sizes)


class Pipeline:
    """One pass over the pieces of all sources."""

    def __init__(
        self,
        sources: Mapping[str, OpenSource],
        store: Path,
        *,
        joined: Sequence[JoinedPiece] = (),
        part: Part = Part(),
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """`store` keeps the pieces; those in `joined` are passed over."""
        self._sources = sources
        self._store = store
        self._joined = joined
        self._part = part
        self._on_progress = on_progress
        all_bytes = size_of(sources)
        self._progress = Progress(total_bytes=None if all_bytes is None else all_bytes // part.of)
        self.num_pieces = 0
        """Pieces of all sources, and of all parts, that were seen."""
        self._digest = hashlib.sha256()

    def run(self, encode: Encode, encoding: Encoding) -> Iterator[PieceFile]:
        """The pieces of the part that are not joined, in order, each as soon as its file is there.

        Raises InputChangedError where a joined piece is not what its source now gives in its place.
        """
        waiting: deque[PieceFile] = deque()
        for done in encode(encoding, self._tasks(waiting)):
            self._report(done)
            while waiting and waiting[0].path.exists():
                yield waiting.popleft()
        yield from waiting
        if self.num_pieces < len(self._joined):
            raise InputChangedError

    @property
    def pieces_sha256(self) -> str:
        """Of the names and sizes of all pieces that were seen: alike on machines that have the same input."""
        return self._digest.hexdigest()

    def _tasks(self, waiting: deque[PieceFile]) -> Iterable[Task]:
        """Tasks for the pieces that are missing; every piece is put in the queue."""
        for label, source in self._sources.items():
            for index, piece in enumerate(source.pieces(self._recall(label))):
                position, self.num_pieces = self.num_pieces, self.num_pieces + 1
                self._digest.update(f"{label}\n{piece.name}\n{piece.size_bytes}\n".encode("utf-8", "surrogateescape"))
                file = PieceFile.of(self._store, label, index, piece)
                if position < len(self._joined):
                    if not self._joined[position].is_of(file):
                        raise InputChangedError
                elif self._part.holds(position):
                    waiting.append(file)
                    if not file.path.exists():
                        yield Task(piece, file.path)
                        continue
                else:
                    continue
                self._find(piece.size_bytes)

    def _recall(self, label: str) -> Recall:
        """What is known of the source's pieces; looked up when first asked for, which only streams do."""
        states: dict[str, State | None] = {}

        def recall(name: str) -> State | None:
            if not states:
                states.update(load_states(self._store / label))
                states.update({piece.name: piece.state for piece in self._joined if piece.label == label})
            return states.get(name)

        return recall

    def _find(self, size_bytes: int) -> None:
        now = self._progress
        self._progress = replace(now, done_bytes=now.done_bytes + size_bytes, found_bytes=now.found_bytes + size_bytes)
        self._on_progress(self._progress)

    def _report(self, done: Done) -> None:
        now = self._progress
        self._progress = replace(
            now,
            documents=now.documents + done.documents,
            text_bytes=now.text_bytes + done.text_bytes,
            tokens=now.tokens + done.tokens,
            done_bytes=now.done_bytes + done.size_bytes,
        )
        self._on_progress(self._progress)
