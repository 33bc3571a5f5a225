"""What every source is made of: pieces, which are read one by one in any process, and the documents in them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

PIECE_BYTES = 2**21
"""Input that a piece holds, about: 2 MiB take a core about a second to tokenize, so that work is shared out evenly,
little is lost when it is interrupted, and a few pieces at once need little memory."""

KEY_BYTES = 16

State = dict[str, Any]
"""Where a stream stands, as JSON holds it."""

Recall = Callable[[str], State | None]
"""The state that was saved with the piece of that name; None where the piece is not yet prepared."""

Dropped = Counter[str]
"""Documents that were left out, by reason."""


@dataclass(frozen=True)
class Document:
    """One text, or a part of a long one: the parts of a document follow each other in their source's pieces.

    `identity` names it in messages, alike on every machine.
    """

    identity: str
    text: str
    begins: bool = True
    ends: bool = True
    whole_key: bytes | None = None
    """The key of the whole document, where this is a part of one."""
    whole_characters: int | None = None
    whole_is_blank: bool | None = None

    @property
    def key(self) -> bytes:
        """Sixteen bytes that depend on the document's whole text alone: which split it is in, and what is a copy."""
        return self.whole_key if self.whole_key is not None else text_key(self.text.encode("utf-8", "surrogatepass"))

    @property
    def is_blank(self) -> bool:
        """Whether the whole document holds white space alone."""
        return not self.text.strip() if self.whole_is_blank is None else self.whole_is_blank

    @property
    def characters(self) -> int:
        """Length of the whole document."""
        return len(self.text) if self.whole_characters is None else self.whole_characters


def text_key(content: bytes) -> bytes:
    """The key of a document of that text, in UTF-8."""
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def ranges(lengths: Iterable[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbours `[start, stop)` whose lengths sum up to `most` at most, or a single longer one."""
    start = stop = filled = 0
    for length in lengths:
        if stop > start and filled + length > most:
            yield start, stop
            start, filled = stop, 0
        filled += length
        stop += 1
    if stop > start:
        yield start, stop


class Piece(Protocol):
    """Neighbouring documents of a source. Picklable; where it begins and ends depends on the input alone."""

    @property
    def name(self) -> str:
        """Names it alike on every machine, unlike all other pieces of its source."""

    @property
    def stamp(self) -> str:
        """Changes when its input does: the times and sizes of files, a dataset's fingerprint, where the piece ends."""

    @property
    def size_bytes(self) -> int:
        """Its share of the source's `size_bytes`."""

    @property
    def state(self) -> State | None:
        """Where the source stands after it; None for a source that can be read from anywhere."""

    def documents(self, dropped: Dropped) -> Iterator[Document]:
        """All its documents, in order; whatever is left out is counted. Raises DataError for input that is broken."""


class OpenSource(Protocol):
    """A source that was found and can be read."""

    @property
    def size_bytes(self) -> int | None:
        """Input in all, in bytes as they are stored, for the time left; None where nobody knows."""

    @property
    def stamp(self) -> str:
        """Changes when any of its input does."""

    def pieces(self, recall: Recall) -> Iterator[Piece]:
        """Its pieces in order. A stream goes on behind the pieces that `recall` knows, and yields those unread."""
