"""Pieces of sources to token ids, in parallel processes.

Imports neither torch nor transformers: worker processes start with this module alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np

from dsllm.data.preparation.piece_store import EncodedPiece, save_piece
from dsllm.data.shards import token_dtype
from dsllm.data.sources.catalogue import kept_documents
from dsllm.data.sources.piece import KEY_BYTES, PIECE_BYTES, Document, Dropped, Piece
from dsllm.data.token_ids import TokenIds
from dsllm.errors import DataError, DsllmError

_BATCH_CHARACTERS = 2**19
_PIECES_WORTH_PROCESSES = 3  # less is done before the processes have started
_PENDING_PER_PROCESS = 2  # one in work, one waiting: enough to keep a process busy, and memory stays bounded


@dataclass(frozen=True)
class Encoding:
    """How text becomes ids, the same for every piece."""

    tokenizer_directory: Path
    end_of_text_id: int
    vocab_size: int
    min_document_characters: int


@dataclass(frozen=True)
class Task:
    """A piece to be encoded, and the file to write."""

    piece: Piece
    path: Path


@dataclass(frozen=True)
class Done:
    """What a piece came to."""

    size_bytes: int
    documents: int
    text_bytes: int
    tokens: int


Encode = Callable[[Encoding, Iterable[Task]], Iterator[Done]]


@contextmanager
def encoder(processes: int, *, much: bool) -> Iterator[Encode]:
    """A function that carries tasks out, in order and whatever the number of processes with the same files.

    One process, or a few pieces, are encoded right here. `much` says that there will be more: the processes start at
    once, beside whatever else is done first. Raises DsllmError where a worker process dies.
    """
    pool = ProcessPoolExecutor(
        processes,
        # Started afresh, not forked: a fork of a process that runs threads can hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    if much and processes > 1:
        for _ in range(processes):
            pool.submit(os.getpid)

    def encode(encoding: Encoding, tasks: Iterable[Task]) -> Iterator[Done]:
        remaining = iter(tasks)
        first = list(islice(remaining, _PIECES_WORTH_PROCESSES))
        if processes == 1 or len(first) < _PIECES_WORTH_PROCESSES:
            return map(_Worker(encoding).encode, chain(first, remaining))
        return _encode_in_order(pool, encoding, chain(first, remaining), _PENDING_PER_PROCESS * processes)

    try:
        yield encode
    except BrokenProcessPool as error:
        raise DsllmError(
            "a tokenizing process died, most likely for lack of memory; try --processes with a lower number"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def is_much(size_bytes: int | None) -> bool:
    """Whether sources of that size, which may be unknown, are worth processes."""
    return size_bytes is not None and size_bytes > _PIECES_WORTH_PROCESSES * PIECE_BYTES


def _encode_in_order(
    pool: ProcessPoolExecutor, encoding: Encoding, tasks: Iterable[Task], max_pending: int
) -> Iterator[Done]:
    pending: deque[Future[Done]] = deque()
    for task in tasks:
        pending.append(pool.submit(_encode_in_worker, encoding, task))
        if len(pending) == max_pending:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class _Worker:
    """Reads, encodes and writes one piece after the other."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._ids = TokenIds.open(encoding.tokenizer_directory)
        self._dtype = token_dtype(encoding.vocab_size)
        self._end_of_text = np.array([encoding.end_of_text_id], self._dtype)

    def encode(self, task: Task) -> Done:
        dropped: Dropped = Counter()
        stretches = _Stretches()
        kept = kept_documents(task.piece, self._encoding.min_document_characters, dropped)
        for batch in _batches(kept):
            for document, ids in zip(batch, self._ids.encode([document.text for document in batch]), strict=True):
                self._check(document, ids)
                stretches.add(document, ids.astype(self._dtype, copy=False), self._end_of_text)
        encoded = stretches.piece(task.piece, self._dtype, dropped)
        save_piece(task.path, encoded)
        return Done(task.piece.size_bytes, encoded.num_documents, int(encoded.text_bytes.sum()), len(encoded.tokens))

    def _check(self, document: Document, ids: np.ndarray) -> None:
        """DataError for ids that cannot be right: no document may hold the end of another."""
        if len(ids) and ids.max() >= self._encoding.vocab_size:
            raise DataError(
                f"{document.identity}: the tokenizer gives it the token {ids.max()}, but says that it has "
                f"{self._encoding.vocab_size} tokens; its folder is damaged: save the tokenizer again"
            )
        if (ids == self._encoding.end_of_text_id).any():
            raise DataError(
                f"{document.identity}: the tokenizer reads its end-of-text token out of the text; "
                f"choose a tokenizer that keeps text apart from it"
            )


class _Stretches:
    """Collects the stretches of a piece."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._starts: list[int] = []
        self._begins: list[bool] = []
        self._keys: list[bytes] = []
        self._text_bytes: list[int] = []
        self._num_tokens = 0

    def add(self, document: Document, ids: np.ndarray, end_of_text: np.ndarray) -> None:
        self._starts.append(self._num_tokens)
        self._begins.append(document.begins)
        self._keys.append(document.key)
        self._text_bytes.append(len(document.text.encode("utf-8", "surrogatepass")))
        for tokens in (ids, end_of_text) if document.ends else (ids,):
            self._tokens.append(tokens)
            self._num_tokens += len(tokens)

    def piece(self, piece: Piece, dtype: np.dtype, dropped: Dropped) -> EncodedPiece:
        return EncodedPiece(
            name=piece.name,
            tokens=np.concatenate([np.empty(0, dtype), *self._tokens]),
            starts=np.array(self._starts, np.int64),
            begins=np.array(self._begins, np.bool_),
            keys=np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, KEY_BYTES),
            text_bytes=np.array(self._text_bytes, np.int64),
            dropped=dict(dropped),
            state=piece.state,
        )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Neighbouring documents together, which the tokenizer takes in one call."""
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


_worker_for = lru_cache(maxsize=1)(_Worker)
"""In a worker process, what encodes: made at its first task."""


def _start_worker() -> None:
    # The processes are the parallelism. One thread of its pool is a fifth faster than `tokenizers` without the pool.
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS="1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that has the others ends them
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for its queue for ever when the process that fills it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker process has a parent"
    parent.join()
    os._exit(1)


def _encode_in_worker(encoding: Encoding, task: Task) -> Done:
    return _worker_for(encoding).encode(task)
