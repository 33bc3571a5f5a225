"""Writing token shards, in the format that shards.py describes and reads."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from dsllm.data.shards import INDEX_DTYPE, Shard, StreamRecord, Tokens, write_durably


class ShardWriter:
    """Writes the documents of one stream; every shard holds `shard_tokens` tokens, the last one what is left.

    A context manager: leaving it lets go of the open file, finished or not.
    """

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._directory = directory
        self._name = name
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._open_shard: _OpenShard | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._open_shard is not None:
            self._open_shard.file.close()

    def write(self, document: Tokens) -> None:
        """Append one document, not empty; where it does not fit, it goes on in the next shard."""
        self._shard().starts.append(self._shard().tokens)
        while len(document):
            shard = self._shard()
            piece, document = np.split(document, [self._shard_tokens - shard.tokens])
            shard.append(piece.astype(self._dtype))
            if shard.tokens == self._shard_tokens:
                self._finish_shard()

    def finish(self) -> StreamRecord:
        """Close the last shard, and tell what was written."""
        if self._open_shard is not None:
            self._finish_shard()
        return StreamRecord(
            tokens=sum(shard.tokens for shard in self._shards),
            documents=sum(shard.documents for shard in self._shards),
            shards=tuple(self._shards),
        )

    def _shard(self) -> _OpenShard:
        if self._open_shard is None:
            self._open_shard = _OpenShard(self._directory / f"{self._name}-{len(self._shards):05d}.bin")
        return self._open_shard

    def _finish_shard(self) -> None:
        self._shards.append(self._shard().finish())
        self._open_shard = None


class _OpenShard:
    """The shard that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = path.open("wb")
        self.digest = hashlib.sha256()
        self.starts: list[int] = []
        self.tokens = 0

    def append(self, tokens: Tokens) -> None:
        content = tokens.tobytes()
        self.digest.update(content)
        self.file.write(content)
        self.tokens += len(tokens)

    def finish(self) -> Shard:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        index = np.array(self.starts, INDEX_DTYPE).tobytes()
        write_durably(self.path.with_suffix(".idx"), index)
        return Shard(
            file=self.path.name,
            index=self.path.with_suffix(".idx").name,
            tokens=self.tokens,
            documents=len(self.starts),
            sha256=self.digest.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
