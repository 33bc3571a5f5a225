"""Documents to token ids, in parallel processes, in the order of the documents.

Imports neither torch nor transformers: worker processes start with this module alone.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dsllm.data.sources import Document
from dsllm.errors import DsllmError

Batch = list["EncodedDocument"]
Encode = Callable[[Iterable[Document]], Iterator[Batch]]

_BATCH_CHARACTERS = 2**19
_BATCHES_WORTH_PROCESSES = 32  # about 16 MB: less is done before the processes have started
_BATCHES_PER_PROCESS = 3  # one in work, two waiting: enough to keep a process busy, and memory stays bounded


@dataclass(frozen=True)
class EncodedDocument:
    """Ids of one document, end-of-text included, and how many bytes of UTF-8 they stand for."""

    identity: str
    ids: npt.NDArray[np.uint32]
    text_bytes: int


@contextmanager
def encoder(tokenizer_file: Path, end_of_text_id: int, processes: int) -> Iterator[Encode]:
    """A function from documents to batches of encoded documents, in the same order whatever the number of processes.

    One process, or little text, is encoded right here. Raises DsllmError where a worker process dies.
    """
    worker = _Worker(tokenizer_file, end_of_text_id)
    pool = ProcessPoolExecutor(
        processes,
        # Started afresh, not forked: a fork of a process that runs threads can hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_file, end_of_text_id),
    )

    def encode(documents: Iterable[Document]) -> Iterator[Batch]:
        batches = _batches(documents)
        first = list(islice(batches, _BATCHES_WORTH_PROCESSES))
        if processes == 1 or len(first) < _BATCHES_WORTH_PROCESSES:
            return map(worker.encode, chain(first, batches))
        return _encode_in_order(pool, chain(first, batches), _BATCHES_PER_PROCESS * processes)

    try:
        yield encode
    except BrokenProcessPool as error:
        raise DsllmError(
            "a tokenizing process died, most likely for lack of memory; try --processes with a lower number"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode_in_order(pool: ProcessPoolExecutor, batches: Iterable[list[Document]], max_pending: int) -> Iterator[Batch]:
    pending: deque[Future[Batch]] = deque()
    for batch in batches:
        pending.append(pool.submit(_encode_in_worker, batch))
        if len(pending) == max_pending:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Neighbouring documents together, so that a message between processes is worth its cost."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Worker:
    """The tokenizer as preparation uses it: whole documents, and a text that spells a special token stays text, so
    that no document can forge the end of another."""

    def __init__(self, tokenizer_file: Path, end_of_text_id: int) -> None:
        self._tokenizer: Any = Tokenizer.from_file(str(tokenizer_file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._end_of_text_id = end_of_text_id

    def encode(self, documents: list[Document]) -> Batch:
        texts = [document.text for document in documents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            EncodedDocument(
                document.identity,
                np.array([*encoding.ids, self._end_of_text_id], dtype=np.uint32),
                len(document.text.encode("utf-8")),
            )
            for document, encoding in zip(documents, encodings, strict=True)
        ]


_worker: _Worker | None = None  # one in each worker process


def _start_worker(tokenizer_file: Path, end_of_text_id: int) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = _Worker(tokenizer_file, end_of_text_id)


def _encode_in_worker(documents: list[Document]) -> Batch:
    assert _worker is not None, "the pool was made without its initializer"
    return _worker.encode(documents)
