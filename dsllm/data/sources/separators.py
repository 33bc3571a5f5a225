"""Long text to stretches of whole documents and parts of long ones, in memory that grows with neither."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from dsllm.data.sources.piece import KEY_BYTES
from dsllm.data.sources.spans import Part

_BLOCK_BYTES = 2**20
_WINDOW_BYTES = 2**16
"""How far before the end of a part a good place to cut is looked for."""
_WHITE_SPACE = b" \t\r\n\v\f"

Line = tuple[int, int]
"""Where a separator line begins, and where the line behind it does."""


@dataclass(frozen=True)
class Stretch:
    """Bytes `[start, stop)` of a text: neighbouring documents, with the separator lines between them, or one part."""

    start: int
    stop: int
    part: Part | None = None


def stretches(blocks: Iterable[bytes], separator: bytes | None, stretch_bytes: int) -> Iterator[Stretch]:
    """A text that arrives in blocks, in stretches of `stretch_bytes` at most, though no character is cut.

    Where there is no separator, the text is one document, be it empty.
    """
    ahead = _Ahead(blocks)
    settled_bytes = stretch_bytes + len(separator or b"") + 2  # a line that begins before this one ends is whole
    while True:
        ahead.fill(settled_bytes)
        if ahead.is_last and len(ahead.text) <= stretch_bytes:
            if ahead.text or (separator is None and ahead.start == 0):
                yield Stretch(ahead.start, ahead.start + len(ahead.text))
            return
        if separator and (line := _last_separator_line(ahead, separator, stretch_bytes)):
            if line[0]:
                yield Stretch(ahead.start, ahead.start + line[0])
            ahead.drop(line[1])
        else:
            yield from _parts(ahead, separator, stretch_bytes)


def whole_documents(text: bytes, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """The documents between the separator lines of a text, and where each begins; no bytes are no document."""
    begin = 0
    while line := _separator_line(text, separator, begin, is_last=True):
        if line[0] > begin:
            yield begin, text[begin : line[0]]
        begin = line[1]
    if begin < len(text):
        yield begin, text[begin:]


def _parts(ahead: _Ahead, separator: bytes | None, part_bytes: int) -> Iterator[Stretch]:
    """The parts of the document that begins here. It is read to its end first, for its key."""
    document = _LongDocument(ahead.start, part_bytes)
    # What stays may be the beginning of a separator line, and the newline before it.
    stays = len(separator) + 3 if separator else 0
    search = 0
    while not (line := _next_separator_line(ahead, separator, search)) and not ahead.is_last:
        document.add(ahead.text[:-stays] if stays else ahead.text)
        ahead.drop(len(ahead.text) - stays)
        ahead.fill(stays + _BLOCK_BYTES)
        search = 1
    document.add(ahead.text[: line[0]] if line else ahead.text)
    ahead.drop(line[1] if line else len(ahead.text))
    yield from document.parts()


def _next_separator_line(ahead: _Ahead, separator: bytes | None, search: int) -> Line | None:
    return _separator_line(ahead.text, separator, search, is_last=ahead.is_last) if separator else None


def _separator_line(text: bytes, separator: bytes, search: int, *, is_last: bool) -> Line | None:
    """The first separator line from a place on: the separator with nothing but a newline, or carriage return and
    newline, behind it."""
    while (at := text.find(separator, search)) >= 0:
        if line := _line_at(text, separator, at, is_last=is_last):
            return line
        search = at + 1
    return None


def _last_separator_line(ahead: _Ahead, separator: bytes, limit: int) -> Line | None:
    """The last one that begins at `limit` or before."""
    end = limit + len(separator)
    while (at := ahead.text.rfind(separator, 0, end)) >= 0:
        if line := _line_at(ahead.text, separator, at, is_last=ahead.is_last):
            return line
        end = at + len(separator) - 1
    return None


def _line_at(text: bytes, separator: bytes, at: int, *, is_last: bool) -> Line | None:
    """The separator line at that place, if it is one. The text's end ends a line only where nothing follows."""
    end = at + len(separator)
    following = text[end : end + 2]
    if at and text[at - 1 : at] != b"\n":
        return None
    if following[:1] == b"\n":
        return at, end + 1
    endings = (b"\r\n", b"\r", b"") if is_last else (b"\r\n",)
    return (at, end + len(following)) if following in endings else None


class _Ahead:
    """The next bytes of a text that arrives in blocks."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self.start = 0
        self.text = b""
        self.is_last = False
        """Whether nothing follows."""
        self._blocks = iter(blocks)

    def fill(self, size: int) -> None:
        """Hold at least so many bytes, or all that there are."""
        arrived = [self.text]
        missing = size - len(self.text)
        while missing > 0 and not self.is_last:
            block = next(self._blocks, None)
            self.is_last = block is None
            arrived.append(block or b"")
            missing -= len(block or b"")
        self.text = b"".join(arrived)

    def drop(self, size: int) -> None:
        self.start += size
        self.text = self.text[size:]


class _LongDocument:
    """A document whose bytes arrive one block after the other."""

    def __init__(self, start: int, part_bytes: int) -> None:
        self._end = start
        self._cuts = [start]
        self._part_bytes = part_bytes
        self._recent = b""
        self._hash = hashlib.blake2b(digest_size=KEY_BYTES)
        # Whatever is no UTF-8 is refused when it is read.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0
        self._is_blank = True

    def add(self, content: bytes) -> None:
        self._hash.update(content)
        characters = self._decoder.decode(content)
        self._characters += len(characters)
        self._is_blank = self._is_blank and (not characters or characters.isspace())
        self._end += len(content)
        self._recent += content
        while self._end - self._cuts[-1] > self._part_bytes and (cut := self._next_cut()) is not None:
            self._cuts.append(cut)
        self._recent = self._recent[-2 * _WINDOW_BYTES :]

    def parts(self) -> Iterator[Stretch]:
        """All of it; nothing may be added any more."""
        first = self._cuts[0]
        whole = (self._hash.digest(), self._characters, self._is_blank)
        for start, stop in pairwise([*self._cuts, self._end]):
            yield Stretch(start, stop, Part(start == first, stop == self._end, first, *whole))

    def _next_cut(self) -> int | None:
        """Just before a newline behind a word, where tokens end too; else between two characters.

        None where the bytes that tell are still to come.
        """
        last, base = self._cuts[-1], self._end - len(self._recent)
        wanted = last + self._part_bytes
        lowest = max(last, wanted - _WINDOW_BYTES)
        search = wanted + 1
        while (newline := self._recent.rfind(b"\n", lowest + 1 - base, search - base)) >= 0:
            if self._recent[newline - 1] not in _WHITE_SPACE:
                return base + newline
            search = base + newline
        # A character has at most three bytes behind its first. Whatever is no UTF-8 is refused when it is read.
        for cut in (*range(wanted, max(wanted - 4, last), -1), *range(wanted + 1, wanted + 4)):
            if cut >= self._end:
                return None
            if not _is_inside_character(self._recent[cut - base]):
                return cut
        return wanted


def _is_inside_character(byte: int) -> bool:
    return byte & 0xC0 == 0x80
