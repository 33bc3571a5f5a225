"""Parquet files: a document in each row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dsllm.data.sources.files import FoundFile, find_files, unreadable
from dsllm.data.sources.messages import no_column, not_text
from dsllm.data.sources.piece import PIECE_BYTES, Document, Dropped, OpenSource, ranges
from dsllm.data.sources.spans import FileSource, Span
from dsllm.errors import DataError, one_line
from dsllm.spec.sections import ParquetSource

_CUTTABLE_PIECES = 4
"""Pieces up to which a row group is shared out: rows inside of one are only reached by decoding those before them."""
_BUFFER_BYTES = 2**20
_BATCH_ROWS = 2**13
"""Rows read at once at most: where texts repeat, a row is encoded in next to nothing."""
_UNREPEATED = {"PLAIN", "RLE", "BIT_PACKED"}
"""Encodings that hold every text in full; RLE is of nulls."""


def open_parquet(source: ParquetSource, piece_bytes: int | None = None) -> OpenSource:
    """Local Parquet files. Raises DataError where there are none."""
    return FileSource(find_files(source, (".parquet",)), ParquetReader(source.text_column, piece_bytes or PIECE_BYTES))


@dataclass(frozen=True)
class _Group:
    """A row group: where its rows begin in the file, and how much text is in it, as it is encoded or about."""

    index: int
    start: int
    num_rows: int
    text_bytes: int
    is_unrepeated: bool

    @property
    def stop(self) -> int:
        return self.start + self.num_rows

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
        """Row ranges, by the file's footer and the first rows of its row groups; of huge ones, the rows themselves."""
        parquet = _open(file)
        self._check_column(file, parquet.schema_arrow)
        num_rows = parquet.metadata.num_rows
        for group in self._groups(parquet):
            for start, stop, text_bytes, carried in self._ranges(file, self._decoded(file, group)):
                size_bytes = file.size_bytes * stop // num_rows - file.size_bytes * start // num_rows
                yield Span(file, start, stop, text_bytes, size_bytes, carried)

    def documents(self, span: Span, dropped: Dropped) -> Iterator[Document]:
        """A document a row; null is an empty one."""
        texts = self._texts(span) if span.carried is None else span.carried
        for row, text in enumerate(texts, span.start):
            yield Document(f"parquet:{span.file.name}:{row}", text or "")

    def _ranges(self, file: FoundFile, group: _Group) -> Iterator[tuple[int, int, int, list[str | None] | None]]:
        """First row and end, bytes of text, and the texts where they were read."""
        rows = group.rows_of(self.piece_bytes)
        if rows * _CUTTABLE_PIECES >= group.num_rows:
            for start in range(group.start, group.stop, rows):
                stop = min(start + rows, group.stop)
                yield start, stop, group.text_bytes * (stop - start) // group.num_rows, None
            return
        start = group.start
        for column in self._batches(file, group, min(_BUFFER_BYTES, self.piece_bytes // _CUTTABLE_PIECES)):
            for texts, text_bytes in _cells(file, column, self.piece_bytes):
                yield start, start + len(texts), text_bytes, texts
                start += len(texts)

    def _texts(self, span: Span) -> Iterator[str | None]:
        """The span's cells, decoded a little at a time."""
        for group in self._groups(_open(span.file)):
            row = group.start
            if not (span.start < group.stop and row < span.stop):
                continue
            for column in self._batches(span.file, group, _BUFFER_BYTES):
                first, last = max(0, span.start - row), max(0, span.stop - row)
                for texts, _ in _cells(span.file, column[first:last], _BUFFER_BYTES):
                    yield from texts
                row += len(column)
                if row >= span.stop:
                    break

    def _decoded(self, file: FoundFile, group: _Group) -> _Group:
        """The group with its size as text, by the mean of its first rows: a text that repeats is encoded once."""
        first = None if group.is_unrepeated else next(self._batches(file, group, _BUFFER_BYTES), None)
        if first is None or not len(first):
            return group
        return replace(group, text_bytes=max(group.text_bytes, sum(_lengths(first)) * group.num_rows // len(first)))

    def _batches(self, file: FoundFile, group: _Group, encoded_bytes: int) -> Iterator[pa.Array]:
        """The column of a row group, about so much of it at a time; texts that repeat stay in a dictionary."""
        with _named(file):
            batches = _open(file, self.text_column).iter_batches(
                min(_BATCH_ROWS, group.rows_of(encoded_bytes)),
                row_groups=[group.index],
                columns=[self.text_column],
                use_threads=False,
            )
        while True:
            with _named(file):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch.column(0)

    def _groups(self, parquet: pq.ParquetFile) -> Iterator[_Group]:
        metadata = parquet.metadata
        number = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == self.text_column)
        start = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            column = group.column(number)
            is_unrepeated = _UNREPEATED.issuperset(column.encodings)
            yield _Group(index, start, group.num_rows, column.total_uncompressed_size, is_unrepeated)
            start += group.num_rows

    def _check_column(self, file: FoundFile, schema: pa.Schema) -> None:
        if self.text_column not in schema.names:
            raise no_column(file.path, self.text_column, schema.names)
        type_ = schema.field(self.text_column).type
        cells = type_.value_type if pa.types.is_dictionary(type_) else type_
        if not (pa.types.is_string(cells) or pa.types.is_large_string(cells) or pa.types.is_string_view(cells)):
            raise not_text(file.path, self.text_column, type_)


def _cells(file: FoundFile, column: pa.Array, text_bytes: int) -> Iterator[tuple[list[str | None], int]]:
    """The texts of a column, so much at a time or a single longer one, and their bytes."""
    lengths = _lengths(column)
    for start, stop in ranges(lengths, text_bytes):
        with _named(file):
            texts = column[start:stop].to_pylist()
        yield texts, sum(lengths[start:stop])


def _lengths(column: pa.Array) -> list[int]:
    """Bytes of each text, which are found without decoding it."""
    if pa.types.is_dictionary(column.type):
        lengths = pc.binary_length(column.dictionary).take(column.indices)
    else:
        lengths = pc.binary_length(column)
    found: list[int] = pc.fill_null(lengths, 0).to_pylist()
    return found


@lru_cache(maxsize=4)
def _open(file: FoundFile, repeating_column: str | None = None) -> pq.ParquetFile:
    """The file, kept open for the next span of it. Read page by page: a row group may be larger than the memory."""
    columns = [repeating_column] if repeating_column else None
    with _named(file):
        return pq.ParquetFile(file.path, pre_buffer=False, buffer_size=_BUFFER_BYTES, read_dictionary=columns)


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
