"""Text files: a document each, or several with a separator line between them."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsllm.data.sources.files import FoundFile, describe_files, find_files, opened, read_range
from dsllm.data.sources.piece import PIECE_BYTES, Document, Dropped, OpenSource
from dsllm.data.sources.separators import stretches, whole_documents
from dsllm.data.sources.spans import FileSource, Span
from dsllm.errors import DataError
from dsllm.spec.sections import PythonStdlibSource, TextSource

TEXT_SUFFIXES = tuple(kind + packing for kind in (".txt", ".md", ".py") for packing in ("", ".gz", ".zst"))
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def open_text(source: TextSource, piece_bytes: int | None = None) -> OpenSource:
    """Local text files. Raises DataError where there are none."""
    separator = source.separator.encode() if source.separator else None
    reader = TextReader("text", separator, piece_bytes or PIECE_BYTES)
    return FileSource(find_files(source, TEXT_SUFFIXES), reader)


def open_stdlib(source: PythonStdlibSource, piece_bytes: int | None = None) -> OpenSource:
    """The standard library's own source files."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (file for file in root.rglob("*.py") if not _STDLIB_LEFT_OUT.intersection(file.relative_to(root).parts))
    reader = TextReader("python-stdlib", None, piece_bytes or PIECE_BYTES)
    return FileSource(describe_files(source, files, root), reader)


@dataclass(frozen=True)
class TextReader:
    """Cuts and reads text files."""

    kind: str
    separator: bytes | None
    piece_bytes: int

    def is_read_to_cut(self, file: FoundFile) -> bool:
        return bool(self.separator or file.codec) or file.size_bytes > self.piece_bytes

    def spans(self, file: FoundFile) -> Iterator[Span]:
        """Small files whole; in large ones neighbouring documents, or the parts of a long one."""
        if not self.is_read_to_cut(file):
            yield Span(file, 0, file.size_bytes, file.size_bytes, file.size_bytes)
            return
        # Compressed, a file is read twice at once: ahead, to find where its documents end, and again to carry them.
        with opened(file) as ahead, opened(file) as stream:
            done_bytes = 0
            for found in stretches(ahead.blocks(), self.separator, self.piece_bytes):
                carried = stream.read_range(found.start, found.stop) if file.codec else None
                read_bytes = stream.stored_bytes if file.codec else found.stop
                text_bytes, size_bytes = found.stop - found.start, read_bytes - done_bytes
                yield Span(file, found.start, found.stop, text_bytes, size_bytes, carried, found.part)
                done_bytes = read_bytes

    def documents(self, span: Span, dropped: Dropped) -> Iterator[Document]:
        """Texts as they are, byte for byte: no newline is translated."""
        content = span.carried if span.carried is not None else read_range(span.file, span.start, span.stop)
        part = span.part
        if part:
            identity = self._identity(span.file, part.document_start)
            text = _decoded(content, span.file, span.start)
            whole = (part.whole_key, part.whole_characters, part.whole_is_blank)
            yield Document(identity, text, part.begins, part.ends, *whole)
        elif self.separator:
            for offset, document in whole_documents(content, self.separator):
                start = span.start + offset
                yield Document(self._identity(span.file, start), _decoded(document, span.file, start))
        else:
            yield Document(self._identity(span.file, 0), _decoded(content, span.file, 0))

    def _identity(self, file: FoundFile, start: int) -> str:
        return f"{self.kind}:{file.name}:{start}" if self.separator else f"{self.kind}:{file.name}"


def _decoded(content: bytes, file: FoundFile, start: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path}: byte {start + error.start} is not valid UTF-8 ({error.reason}); "
            f"convert it to UTF-8, or leave it out"
        ) from error
