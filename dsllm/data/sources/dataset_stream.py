"""Rows of a Hugging Face dataset that are read in order as they arrive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from datasets import IterableDataset

from dsllm.data.sources.messages import broke_off, describe, not_text
from dsllm.data.sources.piece import Document, Dropped, Recall, State
from dsllm.spec.sections import HuggingFaceSource

_BATCH_ROWS = 20
"""Rows taken from a stream at once: few enough to hold many long ones."""


@dataclass(frozen=True)
class StreamPiece:
    """Rows that were read from a stream."""

    name: str
    stamp: str
    size_bytes: int
    state: State
    prefix: str
    first_row: int
    texts: tuple[str, ...] | None
    """None for a piece that was recalled: it is never read."""

    def documents(self, dropped: Dropped) -> Iterator[Document]:
        """A document a row."""
        assert self.texts is not None, "a recalled piece has no input"
        for row, text in enumerate(self.texts, self.first_row):
            yield Document(f"{self.prefix}:{row}", text)


@dataclass(frozen=True)
class DatasetStream:
    """A dataset that is read in order as it arrives."""

    source: HuggingFaceSource
    dataset: IterableDataset
    stamp: str
    prefix: str
    piece_bytes: int
    size_bytes: None = None

    def pieces(self, recall: Recall) -> Iterator[StreamPiece]:
        """Rows for a piece's worth of text each, going on behind the pieces that `recall` knows from the first on."""
        rows = self.dataset.select_columns(self.source.text_column)
        row = 0
        state: State | None = None
        while (known := recall(f"rows:{row}")) and known["stamp"] == self._stamp(known["next_row"]):
            yield self._piece(row, known, None)
            row, state = known["next_row"], known
        if state:
            rows.load_state_dict(state["stream"])
        texts: list[str] = []
        size_bytes = 0
        for batch in self._batches(rows):
            texts += batch
            size_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
            if size_bytes >= self.piece_bytes:
                yield self._piece(row, self._state(rows, row + len(texts), size_bytes), texts)
                row, texts, size_bytes = row + len(texts), [], 0
        if texts:
            yield self._piece(row, self._state(rows, row + len(texts), size_bytes), texts)

    def _stamp(self, next_row: int) -> str:
        """Of the piece that ends there: pieces of another size hold other rows under the same name."""
        return f"{self.stamp}:{self.piece_bytes}:{next_row}"

    def _state(self, rows: IterableDataset, next_row: int, size_bytes: int) -> State:
        stamp = self._stamp(next_row)
        return {"stamp": stamp, "next_row": next_row, "size_bytes": size_bytes, "stream": rows.state_dict()}

    def _piece(self, row: int, state: State, texts: list[str] | None) -> StreamPiece:
        carried = tuple(texts) if texts is not None else None
        return StreamPiece(f"rows:{row}", state["stamp"], state["size_bytes"], state, self.prefix, row, carried)

    def _batches(self, rows: IterableDataset) -> Iterator[list[str]]:
        batches = rows.iter(batch_size=_BATCH_ROWS)
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # of the network, of a file's reader, of fsspec: they have no kind in common
                raise broke_off(self.source, error) from error
            if batch is None:
                return
            yield [self._text(cell) for cell in batch[self.source.text_column]]

    def _text(self, cell: object) -> str:
        if cell is not None and not isinstance(cell, str):
            raise not_text(describe(self.source), self.source.text_column, type(cell).__name__)
        return cell or ""
