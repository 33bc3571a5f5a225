"""JSON lines: a document in each line's object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from dsllm.data.sources.files import FoundFile, find_files, open_plain, opened, unreadable
from dsllm.data.sources.piece import PIECE_BYTES, Document, Dropped, OpenSource
from dsllm.data.sources.spans import FileSource, Span
from dsllm.errors import DataError
from dsllm.spec.sections import JsonlSource

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
MAX_LINE_BYTES = 2**28
"""No document is as long; a file that is one JSON array without newlines may be, and memory is bounded."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def open_jsonl(source: JsonlSource, *, skip_bad_lines: bool = False, piece_bytes: int | None = None) -> OpenSource:
    """Local files of JSON lines. Raises DataError where there are none."""
    reader = JsonlReader(source.text_column, skip_bad_lines, piece_bytes or PIECE_BYTES)
    return FileSource(find_files(source, JSONL_SUFFIXES), reader)


class _BadLineError(Exception):
    """What is wrong with a line, and what to change."""

    def __init__(self, problem: str, remedy: str = "mend it") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True)
class JsonlReader:
    """Cuts and reads files of JSON lines. A span holds the lines that begin in it."""

    text_column: str
    skip_bad_lines: bool
    piece_bytes: int

    def is_read_to_cut(self, file: FoundFile) -> bool:
        return file.codec is not None

    def spans(self, file: FoundFile) -> Iterator[Span]:
        """Byte ranges, found without reading; of a compressed file, its lines."""
        if file.codec:
            yield from self._unpacked_spans(file)
            return
        for start in range(0, file.size_bytes, self.piece_bytes):
            stop = min(start + self.piece_bytes, file.size_bytes)
            yield Span(file, start, stop, stop - start, stop - start)

    def documents(self, span: Span, dropped: Dropped) -> Iterator[Document]:
        """A document a line; blank lines are none. Raises DataError for a bad line, unless they are skipped."""
        for start, line in _lines(span):
            record = (line if start else line.removeprefix(_BYTE_ORDER_MARK)).strip()
            if not record:
                continue
            try:
                text = self._text(record)
            except _BadLineError as error:
                if not self.skip_bad_lines:
                    raise DataError(
                        f"{span.file.path}: line {_line_number(span.file, start)} {error.problem}; {error.remedy}, or "
                        f"leave such lines out with dsllm data prepare --skip-bad-lines"
                    ) from error
                dropped["bad line"] += 1
            else:
                yield Document(f"jsonl:{span.file.name}:{start}", text)

    def _unpacked_spans(self, file: FoundFile) -> Iterator[Span]:
        """Blocks of whole lines. A line that is longer than a piece is a block of its own."""
        with opened(file) as stream:
            start, pending, done_bytes = 0, b"", 0
            while block := stream.read(self.piece_bytes):
                end = block.rfind(b"\n") + 1
                if end == 0:
                    pending += block
                    _check_length(file, start, len(pending))
                    continue
                carried, pending = pending + block[:end], block[end:]
                yield _carried(file, start, carried, stream.stored_bytes - done_bytes)
                start, done_bytes = start + len(carried), stream.stored_bytes
            if pending:
                yield _carried(file, start, pending, stream.stored_bytes - done_bytes)

    def _text(self, line: bytes) -> str:
        try:
            decoded = line.decode("utf-8")
            record = json.loads(decoded)
        except json.JSONDecodeError as error:
            raise _BadLineError(f"is not JSON ({error.msg})") from error
        except UnicodeDecodeError as error:
            raise _BadLineError(f"is not valid UTF-8 ({error.reason})") from error
        except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
            raise _BadLineError("is not JSON that can be read (too deep, or too long a number)") from error
        text = self._cell(record)
        return _without_lone_surrogates(text) if _SURROGATE_ESCAPE.search(decoded) else text

    def _cell(self, record: object) -> str:
        if not isinstance(record, dict):
            raise _BadLineError(f"holds {_kind(record)} instead of an object")
        if self.text_column not in record:
            keys = ", ".join(record) or "nothing"
            raise _BadLineError(f"has no {self.text_column!r}, but {keys}", "set text_column to one of them")
        cell = record[self.text_column]
        if cell is None:
            return ""
        if not isinstance(cell, str):
            raise _BadLineError(f"holds {_kind(cell)} in {self.text_column!r}", "set text_column to a key of text")
        return cell


def _carried(file: FoundFile, start: int, carried: bytes, size_bytes: int) -> Span:
    return Span(file, start, start + len(carried), len(carried), size_bytes, carried)


def _lines(span: Span) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in the span, and where."""
    if span.carried is not None:
        yield from _lines_from(BytesIO(span.carried), span, 0)
        return
    with open_plain(span.file) as stream:
        try:
            yield from _lines_from(stream, span, _after_first_newline(stream, span))
        except OSError as error:
            raise unreadable(span.file.path, error) from error


def _lines_from(stream: BinaryIO, span: Span, position: int) -> Iterator[tuple[int, bytes]]:
    """Lines from a position of the stream to the span's end; of carried ones, positions count from the span's start."""
    offset = span.start if span.carried is not None else 0
    while offset + position < span.stop and (line := stream.readline(MAX_LINE_BYTES + 1)):
        _check_length(span.file, offset + position, len(line))
        yield offset + position, line
        position += len(line)


def _after_first_newline(stream: BinaryIO, span: Span) -> int:
    """Seek the first line that begins in the span, or somewhere behind it; where that is."""
    if span.start == 0:
        return 0
    stream.seek(span.start - 1)  # a newline right before the span begins a line with it
    while stream.tell() < span.stop and (rest := stream.readline(2**20)):
        if rest.endswith(b"\n"):
            break
    return stream.tell()


def _check_length(file: FoundFile, start: int, length: int) -> None:
    if length > MAX_LINE_BYTES:
        raise DataError(
            f"{file.path}: line {_line_number(file, start)} is longer than {MAX_LINE_BYTES // 2**20} MiB; a document "
            f"is one line: write each object of a JSON array on a line of its own"
        )


def _line_number(file: FoundFile, start: int) -> int:
    """Lines up to the one that begins at that byte; counted by reading the file again, which only errors do."""
    newlines = 0
    with opened(file) as stream:
        for block in stream.blocks():
            newlines += block.count(b"\n", 0, max(0, start - (stream.position - len(block))))
            if stream.position >= start:
                break
    return newlines + 1


def _without_lone_surrogates(text: str) -> str:
    """Half of an escaped pair, which no UTF-8 can hold, becomes U+FFFD as in every decoder."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _kind(value: object) -> str:
    """The value's type as JSON calls it."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
