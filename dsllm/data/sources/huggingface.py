"""Datasets of the Hugging Face `datasets` library: written by `save_to_disk`, on the Hub, or a folder of data files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, Value, load_dataset, load_dataset_builder, load_from_disk

from dsllm.data.sources.dataset_stream import DatasetStream
from dsllm.data.sources.messages import describe, no_column, no_text, not_text
from dsllm.data.sources.piece import PIECE_BYTES, Document, Dropped, OpenSource, Recall, State, ranges
from dsllm.errors import DataError, one_line
from dsllm.spec.sections import HuggingFaceSource


def open_huggingface(source: HuggingFaceSource, piece_bytes: int | None = None) -> OpenSource:
    """The split of the dataset. Raises DataError where it cannot be loaded, or has no such column of text."""
    try:
        dataset, stamp = _load(source)
        _check_column(source, dataset)
    except DataError:
        raise
    except Exception as error:  # of the library, of pyarrow, of the network: they have no kind in common
        raise _not_loaded(source, error) from error
    prefix = f"huggingface:{Path(source.name).name}:{source.subset or ''}:{source.split}"
    if isinstance(dataset, Dataset):
        return DatasetRows(dataset.select_columns(source.text_column), stamp, prefix, piece_bytes or PIECE_BYTES)
    return DatasetStream(source, dataset, stamp, prefix, piece_bytes or PIECE_BYTES)


def _load(source: HuggingFaceSource) -> tuple[Dataset | IterableDataset, str]:
    """The split, and what changes when its rows do."""
    folder = Path(source.name).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = _saved_split(source, folder)
        return saved.to_iterable_dataset() if source.streaming else saved, _files_stamp(saved)
    name = str(folder) if folder.exists() else source.name
    if source.streaming:
        builder = load_dataset_builder(name, source.subset, revision=source.revision)
        return builder.as_streaming_dataset(split=source.split), builder.hash
    loaded = load_dataset(name, source.subset, split=source.split, revision=source.revision)
    return loaded, _files_stamp(loaded)


def _saved_split(source: HuggingFaceSource, folder: Path) -> Dataset:
    """What `save_to_disk` wrote: the split of several, or the only one."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if source.split not in splits:
            raise DataError(f"{describe(source)}: no split {source.split!r}; set split to one of {', '.join(splits)}")
        folder = folder / source.split
    try:
        saved = load_from_disk(folder)
    except IndexError as error:  # without rows there is no file, and the library expects one
        raise no_text(source, Dropped()) from error
    if not saved.num_rows:
        raise no_text(source, Dropped())
    return saved


def _files_stamp(dataset: Dataset) -> str:
    """From the sizes and times of the files that the rows are mapped from."""
    files = [os.stat(file["filename"]) for file in dataset.cache_files]
    facts = [dataset.num_rows, *((file.st_size, file.st_mtime_ns) for file in files)]
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def _not_loaded(source: HuggingFaceSource, error: Exception) -> DataError:
    if isinstance(error, ConnectionError):
        return DataError(
            f"{describe(source)}: the Hugging Face Hub cannot be reached ({one_line(error)}); mend the network, or set "
            f"name to a local copy: a folder that datasets' save_to_disk wrote, or one of Parquet files"
        )
    return DataError(
        f"{describe(source)}: cannot be loaded ({one_line(error)}); correct its name, subset, split or revision, or "
        f"set name to a folder that datasets' save_to_disk wrote"
    )


def _check_column(source: HuggingFaceSource, dataset: Dataset | IterableDataset) -> None:
    column, features = source.text_column, dataset.features
    if features is None:  # a stream that does not say what it holds
        first = next(iter(dataset), {column: None})
        features = {name: Value("string" if isinstance(cell, str | None) else "null") for name, cell in first.items()}
    if column not in features:
        raise no_column(describe(source), column, features)
    type_ = features[column]
    if not isinstance(type_, Value) or type_.dtype not in ("string", "large_string"):
        raise not_text(describe(source), column, getattr(type_, "dtype", type_))


@dataclass(frozen=True)
class RowsPiece:
    """Rows `[start, stop)` of a dataset. Only they are pickled: as the names of the files that they are mapped from."""

    dataset: Dataset
    start: int
    stop: int
    first_row: int
    """Of the source, whose number `start` is no more once the piece was pickled."""
    stamp: str
    prefix: str
    size_bytes: int
    state: State | None = None

    @property
    def name(self) -> str:
        return f"rows:{self.first_row}"

    def documents(self, dropped: Dropped) -> Iterator[Document]:
        """A document a row; null is an empty one."""
        (cells,) = self.dataset[self.start : self.stop].values()
        for row, text in enumerate(cells, self.first_row):
            yield Document(f"{self.prefix}:{row}", text or "")

    def __reduce__(self) -> tuple[Any, ...]:
        rows = self.dataset.select(range(self.start, self.stop))
        fields = (rows, 0, len(rows), self.first_row, self.stamp, self.prefix, self.size_bytes)
        return type(self), fields


@dataclass(frozen=True)
class DatasetRows:
    """A dataset whose files are here, with its text column alone."""

    dataset: Dataset
    stamp: str
    prefix: str
    piece_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.dataset.data.nbytes

    def pieces(self, recall: Recall) -> Iterator[RowsPiece]:
        """Rows for a piece's worth of text each."""
        size_bytes, num_rows = self.size_bytes, self.dataset.num_rows
        for start, stop in ranges(_lengths(self.dataset.data.table.column(0)), self.piece_bytes):
            share = size_bytes * stop // num_rows - size_bytes * start // num_rows
            stamp = f"{self.stamp}:{stop}"
            yield RowsPiece(self.dataset, start, stop, start, stamp, self.prefix, share)


def _lengths(column: pa.ChunkedArray) -> Iterator[int]:
    """Bytes of each text, which are found without reading it."""
    for chunk in column.chunks:
        yield from pc.fill_null(pc.binary_length(chunk), 0).to_pylist()
