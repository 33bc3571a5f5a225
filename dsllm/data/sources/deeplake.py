"""Deep Lake datasets, local or on Activeloop's servers, through the optional library `deeplake`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsllm.data.sources.messages import broke_off, describe, no_column, not_text
from dsllm.data.sources.piece import PIECE_BYTES, Document, Dropped, OpenSource, Recall, State
from dsllm.errors import DataError, one_line
from dsllm.spec.sections import DeepLakeSource

_SAMPLE_ROWS = 1000
_BATCH_ROWS = 100
"""Rows read at once: few enough to hold many long ones."""


def open_deeplake(source: DeepLakeSource, piece_bytes: int | None = None) -> OpenSource:
    """The dataset's text column. Raises DataError where it cannot be opened or has no such column."""
    address = source.path if "://" in source.path else str(Path(source.path).expanduser())
    described = describe(source)
    dataset = _open(address, described)
    try:
        _check_column(source, dataset)
        facts = (
            getattr(dataset, "id", None),
            getattr(dataset, "version", None),
            len(dataset),
        )  # neither in Deep Lake 3
        mean_bytes = _mean_bytes(dataset[source.text_column], min(len(dataset), _SAMPLE_ROWS))
    except DataError:
        raise
    except Exception as error:
        raise _not_opened(described, error) from error
    stamp = hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
    return DeepLakeColumn(source, address, len(dataset), mean_bytes, stamp, piece_bytes or PIECE_BYTES)


def _open(address: str, described: str) -> Any:
    """The dataset, read-only. Raises DataError where that cannot be."""
    try:
        import deeplake
    except ImportError as error:
        raise DataError(f"{described}: deeplake is not installed; pip install 'dsllm[deeplake]'") from error
    # No kind of error is common to what deeplake raises.
    try:
        return deeplake.open_read_only(address)
    except Exception as error:
        try:  # a dataset that Deep Lake 3 wrote is found by a query alone
            return deeplake.query(f'SELECT * FROM "{address}"')
        except Exception:
            raise _not_opened(described, error) from error


def _not_opened(described: str, error: Exception) -> DataError:
    return DataError(
        f"{described}: cannot be opened ({one_line(error)}); correct the path, mend the network, or log in "
        f"(ACTIVELOOP_TOKEN); what Deep Lake 3 wrote and this one cannot read, deeplake.convert rewrites"
    )


@lru_cache(maxsize=2)
def _kept_open(address: str, described: str, stamp: str) -> Any:
    """The dataset as a process keeps it for its next piece."""
    return _open(address, described)


def _check_column(source: DeepLakeSource, dataset: Any) -> None:
    types = {column.name: column.dtype for column in dataset.schema.columns}
    if source.text_column not in types:
        raise no_column(describe(source), source.text_column, sorted(types))
    type_ = types[source.text_column]
    if type_.id != "text" or type_.is_sequence:
        raise not_text(describe(source), source.text_column, type_)


@dataclass(frozen=True)
class DeepLakePiece:
    """Rows `[start, stop)`, which whoever reads them opens the dataset for."""

    source: DeepLakeSource
    address: str
    start: int
    stop: int
    dataset_stamp: str
    size_bytes: int
    state: State | None = None

    @property
    def name(self) -> str:
        return f"rows:{self.start}"

    @property
    def stamp(self) -> str:
        return f"{self.dataset_stamp}:{self.stop}"

    def documents(self, dropped: Dropped) -> Iterator[Document]:
        """A document a row. Raises DsllmError where reading breaks off."""
        name = Path(self.source.path).name
        for row, text in enumerate(self._cells(), self.start):
            yield Document(f"deeplake:{name}:{row}", text)

    def _cells(self) -> Iterator[str]:
        dataset = _kept_open(self.address, describe(self.source), self.dataset_stamp)
        try:
            yield from _texts(dataset[self.source.text_column], self.start, self.stop)
        except Exception as error:
            raise broke_off(self.source, error) from error


@dataclass(frozen=True)
class DeepLakeColumn:
    """A column of text."""

    source: DeepLakeSource
    address: str
    num_rows: int
    mean_bytes: float
    """Of the first rows; nothing tells the size of the others but reading them."""
    stamp: str
    piece_bytes: int

    @property
    def size_bytes(self) -> int:
        return int(self.num_rows * self.mean_bytes)

    def pieces(self, recall: Recall) -> Iterator[DeepLakePiece]:
        """Rows for a piece's worth of text each, by the mean length of the first ones."""
        rows = max(1, int(self.piece_bytes / max(1.0, self.mean_bytes)))
        for start in range(0, self.num_rows, rows):
            stop = min(start + rows, self.num_rows)
            size_bytes = int(stop * self.mean_bytes) - int(start * self.mean_bytes)
            yield DeepLakePiece(self.source, self.address, start, stop, self.stamp, size_bytes)


def _mean_bytes(column: Any, num_rows: int) -> float:
    """Length of the first rows' texts."""
    return sum(len(text.encode()) for text in _texts(column, 0, num_rows)) / max(1, num_rows)


def _texts(column: Any, start: int, stop: int) -> Iterator[str]:
    """Cells `[start, stop)`; an empty one is given as None."""
    for at in range(start, stop, _BATCH_ROWS):
        for text in column[at : min(at + _BATCH_ROWS, stop)]:
            yield text or ""
