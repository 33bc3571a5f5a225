"""Parquet files: a document in each row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from dsllm.data.sources.files import FoundFile, find_files, unreadable
from dsllm.data.sources.messages import no_column, not_text, one_line
from dsllm.data.sources.piece import PIECE_BYTES, Document, Dropped, OpenSource
from dsllm.data.sources.spans import FileSource, Span
from dsllm.errors import DataError
from dsllm.spec.sections import ParquetSource

_CUTTABLE_PIECES = 4
"""Pieces up to which a row group is shared out: rows inside of one are only reached by decoding those before them."""
_BUFFER_BYTES = 2**20


def open_parquet(source: ParquetSource, piece_bytes: int | None = None) -> OpenSource:
    """Local Parquet files. Raises DataError where there are none."""
    return FileSource(find_files(source, (".parquet",)), ParquetReader(source.text_column, piece_bytes or PIECE_BYTES))


@dataclass(frozen=True)
class _Group:
    """A row group: where its rows begin in the file, and how much text is in it, as it is encoded."""

    index: int
    start: int
    num_rows: int
    text_bytes: int

    def rows_of(self, text_bytes: int) -> int:
        """How many rows hold about so much text."""
        return max(1, self.num_rows * text_bytes // max(1, self.text_bytes))


@dataclass(frozen=True)
class ParquetReader:
    """Cuts and reads Parquet files. Positions count rows."""

    text_column: str
    piece_bytes: int

    def is_read_to_cut(self, file: FoundFile) -> bool:
        return True  # where a row group is too large to be shared out

    def spans(self, file: FoundFile) -> Iterator[Span]:
        """Row ranges, by what the file's footer says; of huge row groups, the rows themselves."""
        parquet = _open(file)
        self._check_column(file, parquet.schema_arrow)
        num_rows = parquet.metadata.num_rows
        for group in self._groups(parquet):
            for start, stop, carried in self._ranges(file, group, group.rows_of(self.piece_bytes)):
                text_bytes = group.text_bytes * (stop - start) // group.num_rows
                size_bytes = file.size_bytes * stop // num_rows - file.size_bytes * start // num_rows
                yield Span(file, start, stop, text_bytes, size_bytes, carried)

    def documents(self, span: Span, dropped: Dropped) -> Iterator[Document]:
        """A document a row; null is an empty one."""
        texts = self._texts(span) if span.carried is None else span.carried
        for row, text in enumerate(texts, span.start):
            yield Document(f"parquet:{span.file.name}:{row}", text or "")

    def _ranges(self, file: FoundFile, group: _Group, rows: int) -> Iterator[tuple[int, int, list[str | None] | None]]:
        start, end = group.start, group.start + group.num_rows
        if rows * _CUTTABLE_PIECES >= group.num_rows:
            for at in range(start, end, rows):
                yield at, min(at + rows, end), None
            return
        for texts in self._read(file, group, rows):
            yield start, start + len(texts), texts
            start += len(texts)

    def _texts(self, span: Span) -> Iterator[str | None]:
        """The span's cells, decoded a little at a time."""
        for group in self._groups(_open(span.file)):
            first, last = max(span.start, group.start), min(span.stop, group.start + group.num_rows)
            if first >= last:
                continue
            row = group.start
            for texts in self._read(
                span.file, group, max(1, group.num_rows * _BUFFER_BYTES // max(1, group.text_bytes))
            ):
                yield from texts[max(0, first - row) : max(0, last - row)]
                row += len(texts)
                if row >= last:
                    break

    def _read(self, file: FoundFile, group: _Group, rows: int) -> Iterator[list[str | None]]:
        """The cells of a row group, so many at a time."""
        batches = _open(file).iter_batches(
            rows, row_groups=[group.index], columns=[self.text_column], use_threads=False
        )
        while True:
            with _named(file):
                texts = next((batch.column(0).to_pylist() for batch in batches), None)
            if texts is None:
                return
            yield texts

    def _groups(self, parquet: pq.ParquetFile) -> Iterator[_Group]:
        metadata = parquet.metadata
        column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == self.text_column)
        start = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            yield _Group(index, start, group.num_rows, group.column(column).total_uncompressed_size)
            start += group.num_rows

    def _check_column(self, file: FoundFile, schema: pa.Schema) -> None:
        if self.text_column not in schema.names:
            raise no_column(file.path, self.text_column, schema.names)
        type_ = schema.field(self.text_column).type
        cells = type_.value_type if pa.types.is_dictionary(type_) else type_
        if not (pa.types.is_string(cells) or pa.types.is_large_string(cells) or pa.types.is_string_view(cells)):
            raise not_text(file.path, self.text_column, type_)


@lru_cache(maxsize=2)
def _open(file: FoundFile) -> pq.ParquetFile:
    """The file, kept open for the next span of it. Read page by page: a row group may be larger than the memory."""
    with _named(file):
        return pq.ParquetFile(file.path, pre_buffer=False, buffer_size=_BUFFER_BYTES)


@contextmanager
def _named(file: FoundFile) -> Iterator[None]:
    """Name the file in what goes wrong."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{file.path}: not a Parquet file that can be read ({one_line(error)}); fetch it again, or leave it out"
        ) from error
    except OSError as error:
        if error.errno is None:  # no refusal of the system, but a page that does not unpack
            raise DataError(
                f"{file.path}: a damaged Parquet file ({one_line(error)}); fetch it again, or leave it out"
            ) from error
        raise unreadable(file.path, error) from error
