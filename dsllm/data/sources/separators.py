"""Long text to documents and their parts, block by block, in memory that grows with neither."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from dsllm.data.sources.piece import KEY_BYTES

_WINDOW_BYTES = 2**16
"""How far before the end of a part a good place to cut is looked for."""
_WHITE_SPACE = b" \t\r\n\v\f"


@dataclass(frozen=True)
class Extent:
    """Where a document lies, in bytes from the start of its text, and where it is cut in parts."""

    cuts: tuple[int, ...]
    """Its start, and the end of each part."""
    key: bytes


def extents(blocks: Iterable[bytes], separator: bytes | None, part_bytes: int) -> Iterator[Extent]:
    """The documents of a text that arrives in blocks. Parts hold `part_bytes` at most, but no character is cut."""
    document: _Growing | None = None
    for start, content, ends in separated(blocks, separator):
        document = document or _Growing(start, part_bytes)
        document.add(content)
        if ends:
            if document.end > document.start or separator is None:
                yield document.extent()
            document = None


def separated(blocks: Iterable[bytes], separator: bytes | None) -> Iterator[tuple[int, bytes, bool]]:
    """What stands between the separator lines of a text: where, some bytes, and whether a document ends behind them.

    A line is the separator with nothing but its newline (or carriage return and newline) behind it.
    """
    start, pending, before = 0, b"", b"\n"
    for block in chain(filter(None, blocks), [b""]):
        is_last = not block
        pending += block
        begin = 0
        for line, end in _separator_lines(pending, before, separator, is_last):
            yield start + begin, pending[begin:line], True
            begin = end
        # Behind this, a separator line may have begun whose end is still to come.
        settled = len(pending) if is_last or separator is None else max(begin, len(pending) - len(separator) - 1)
        yield start + begin, pending[begin:settled], is_last
        before = pending[settled - 1 : settled] or before
        start, pending = start + settled, pending[settled:]


def whole_documents(text: bytes, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """The documents of a text that is all there, with the place of each; nothing between two separators is none."""
    begin = 0
    for line, end in [*_separator_lines(text, b"\n", separator, True), (len(text), len(text))]:
        if line > begin:
            yield begin, text[begin:line]
        begin = end


def _separator_lines(text: bytes, before: bytes, separator: bytes | None, is_last: bool) -> Iterator[tuple[int, int]]:
    """Begin and end of every separator line in the text; `before` is the byte that stands before it.

    Unless the text is the last, a line at its end is left out where the next bytes may still change what it is.
    """
    at = 0 if separator else -1
    while separator and (at := text.find(separator, at)) >= 0:
        end = at + len(separator)
        if end + 2 > len(text) and not is_last:
            return
        newline = _newline_bytes(text[end : end + 2])
        if (text[at - 1 : at] if at else before) == b"\n" and newline is not None:
            yield at, end + newline
            at = end + newline
        else:
            at += 1


def _newline_bytes(following: bytes) -> int | None:
    """Bytes of the newline that ends a line here, none of them at the end of the text; None where the line goes on."""
    if following[:1] == b"\n":
        return 1
    return len(following) if following in (b"\r\n", b"\r", b"") else None


class _Growing:
    """A document whose bytes arrive one block after the other."""

    def __init__(self, start: int, part_bytes: int) -> None:
        self.start = start
        self.end = start
        self._cuts = [start]
        self._part_bytes = part_bytes
        self._recent = b""
        self._hash = hashlib.blake2b(digest_size=KEY_BYTES)

    def add(self, content: bytes) -> None:
        self._hash.update(content)
        self.end += len(content)
        self._recent += content
        while self.end - self._cuts[-1] > self._part_bytes and (cut := self._next_cut()) is not None:
            self._cuts.append(cut)
        self._recent = self._recent[-2 * _WINDOW_BYTES :]

    def extent(self) -> Extent:
        return Extent((*self._cuts, self.end), self._hash.digest())

    def _next_cut(self) -> int | None:
        """Just before a newline behind a word, where tokens end too; else between two characters.

        None where the bytes that tell are still to come.
        """
        last, base = self._cuts[-1], self.end - len(self._recent)
        wanted = last + self._part_bytes
        lowest = max(last, wanted - _WINDOW_BYTES)
        search = wanted + 1
        while (newline := self._recent.rfind(b"\n", lowest + 1 - base, search - base)) >= 0:
            if self._recent[newline - 1] not in _WHITE_SPACE:
                return base + newline
            search = base + newline
        # A character has at most three bytes behind its first. Whatever is no UTF-8 is refused when it is read.
        nearby = [*range(wanted, max(wanted - 4, last), -1), *range(wanted + 1, wanted + 4)]
        for cut in nearby:
            if cut >= self.end:
                return None
            if not _is_inside_character(self._recent[cut - base]):
                return cut
        return wanted


def _is_inside_character(byte: int) -> bool:
    return byte & 0xC0 == 0x80
