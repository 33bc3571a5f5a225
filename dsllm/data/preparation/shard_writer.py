"""Writing token shards, in the format that shards.py describes and reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dsllm.data.shards import INDEX_DTYPE, Record, Shard, StreamRecord, Tokens, edges_sha256
from dsllm.errors import DsllmError

_READ_BYTES = 2**20


class WrittenSoFar(Record):
    """How far a stream was on the disk: enough to go on from there."""

    shards: tuple[Shard, ...] = ()
    open_tokens: int = 0
    """Tokens in the shard that was open, 0 where none was."""
    open_documents: int = 0
    """Documents that start in it."""


class ShardWriter:
    """Writes the documents of one stream; every shard holds `shard_tokens` tokens, the last one what is left.

    A shard has its name once it is whole. A context manager: leaving it lets go of the open file, finished or not.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        dtype: np.dtype[Any],
        shard_tokens: int,
        after: WrittenSoFar = WrittenSoFar(),  # noqa: B008 - immutable
    ) -> None:
        """Go on `after` what an earlier writer of the same stream had written, or begin."""
        self._directory = directory
        self._name = name
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards = list(after.shards)
        self._open_shard: _OpenShard | None = None
        if after.open_tokens:
            self._open_shard = _OpenShard(self._path(), dtype, after.open_tokens, after.open_documents)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._open_shard is not None:
            self._open_shard.close()

    def write(self, tokens: Tokens, starts: Sequence[int]) -> None:
        """Append neighbouring documents; what does not fit goes on in the next shard.

        `starts` are the places in `tokens` where documents begin, ascending.
        """
        written = 0
        pending = np.asarray(starts, np.int64)
        while written < len(tokens):
            shard = self._shard()
            piece = tokens[written : written + self._shard_tokens - shard.tokens]
            inside = int(np.searchsorted(pending, written + len(piece)))
            shard.append(piece.astype(self._dtype, copy=False), pending[:inside] - written)
            written, pending = written + len(piece), pending[inside:]
            if shard.tokens == self._shard_tokens:
                self._finish_shard()

    def so_far(self) -> WrittenSoFar:
        """What is written, once it is safely on the disk."""
        shard = self._open_shard
        if shard is None:
            return WrittenSoFar(shards=tuple(self._shards))
        shard.sync()
        return WrittenSoFar(shards=tuple(self._shards), open_tokens=shard.tokens, open_documents=shard.documents)

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
            self._open_shard = _OpenShard(self._path(), self._dtype)
        return self._open_shard

    def _path(self) -> Path:
        return self._directory / f"{self._name}-{len(self._shards):05d}.bin"

    def _finish_shard(self) -> None:
        self._shards.append(self._shard().finish())
        self._open_shard = None


class _OpenShard:
    """The shard that is being written, its tokens and its index under temporary names."""

    def __init__(self, path: Path, dtype: np.dtype[Any], tokens: int = 0, documents: int = 0) -> None:
        """Go on behind the first `tokens` and `documents`: whatever was written after them is cut off."""
        self.tokens = tokens
        self.documents = documents
        self._tokens_file = _HashedFile(path, tokens * dtype.itemsize)
        self._index_file = _HashedFile(path.with_suffix(".idx"), documents * INDEX_DTYPE.itemsize)

    def append(self, tokens: Tokens, starts: npt.NDArray[np.int64]) -> None:
        """`starts` count from the first of `tokens`."""
        self._tokens_file.append(tokens.tobytes())
        self._index_file.append((starts + self.tokens).astype(INDEX_DTYPE).tobytes())
        self.tokens += len(tokens)
        self.documents += len(starts)

    def sync(self) -> None:
        self._tokens_file.sync()
        self._index_file.sync()

    def close(self) -> None:
        # Both, whatever fails: what stayed in a buffer would be written later, behind another writer's bytes.
        with closing(self._index_file.file), closing(self._tokens_file.file):
            pass

    def finish(self) -> Shard:
        sha256, index_sha256 = self._tokens_file.finish(), self._index_file.finish()
        return Shard(
            file=self._tokens_file.path.name,
            index=self._index_file.path.name,
            tokens=self.tokens,
            documents=self.documents,
            sha256=sha256,
            edges_sha256=edges_sha256(self._tokens_file.path),
            index_sha256=index_sha256,
        )


class _HashedFile:
    """A file that grows under a temporary name, with the SHA-256 of what is in it."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Keep the first `size_bytes` of what is there. DsllmError where there is less: that was not us."""
        self.path = path
        self._temporary = path.with_name(f"{path.name}.tmp")
        self._digest = hashlib.sha256()
        if path.exists() and not self._temporary.exists():
            os.replace(path, self._temporary)  # it was finished after what is known of it was noted down
        self.file: BinaryIO = self._temporary.open("ab")
        if self.file.tell() < size_bytes:
            raise DsllmError(
                f"{self._temporary}: {self.file.tell()} bytes, and {size_bytes} were written before preparation was "
                f"interrupted; something changed it: delete {path.parent} and prepare the data again"
            )
        self.file.truncate(size_bytes)
        with self._temporary.open("rb") as written:
            while piece := written.read(_READ_BYTES):
                self._digest.update(piece)

    def append(self, content: bytes) -> None:
        self._digest.update(content)
        self.file.write(content)

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> str:
        """Give the file its name; its checksum."""
        self.sync()
        self.file.close()
        os.replace(self._temporary, self.path)
        return self._digest.hexdigest()
