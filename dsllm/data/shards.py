"""Token shards: the prepared data on disk.

A folder holds, for each source and split, files of raw token ids (`news-train-00000.bin`, little-endian uint16 or
uint32) that make one long stream when read in order; beside each an index of the documents that start in it (`.idx`,
little-endian int64 offsets into the shard); and `manifest.json`, which is written last, so that a folder with a
manifest is complete.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from dsllm.errors import DataError

MANIFEST_FILE = "manifest.json"
TOKENIZER_DIRECTORY = "tokenizer"
TOKENIZER_FILE = "tokenizer.json"
INDEX_DTYPE = np.dtype("<i8")
EDGE_BYTES = 2**20
"""At either end of a shard: what `edges_sha256` reads of it."""

Split = Literal["train", "validation"]
Tokens = npt.NDArray[np.unsignedinteger[Any]]

_PREPARE_AGAIN = "delete the folder and prepare the data again (dsllm data prepare)"


class Record(BaseModel):
    """A part of the manifest: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(Record):
    """One `.bin` file and its index; `documents` counts those that start in it."""

    file: str
    index: str
    tokens: int
    documents: int
    sha256: str
    index_sha256: str
    edges_sha256: str = ""
    """Of the first and last MiB of the tokens; empty where it was not noted down."""


class StreamRecord(Record):
    """The shards of one source's documents in one split, in order. Every document ends with end-of-text."""

    tokens: int
    documents: int
    shards: tuple[Shard, ...]


class SourceRecord(Record):
    """What a source gave: documents and bytes of UTF-8 that were kept, documents that were not, by reason."""

    label: str
    source: str
    """Its description, as messages have it."""
    documents: int
    text_bytes: int
    dropped: dict[str, int]
    streams: dict[Split, StreamRecord]
    """Splits in which it has documents."""


class Manifest(Record):
    """What a folder of shards holds, and from which sections of a spec (`inputs`) it was made."""

    version: Literal[2] = 2
    inputs: dict[str, Any]
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    end_of_text_id: int
    tokenizer_sha256: str
    tokenizer_files: dict[str, str] = {}
    """SHA-256 of each file of the tokenizer's folder: any of them may decide how text is encoded."""
    sources: tuple[SourceRecord, ...]
    """In the order of the spec, those that are only validated on last."""

    @property
    def documents(self) -> int:
        return sum(source.documents for source in self.sources)

    @property
    def text_bytes(self) -> int:
        return sum(source.text_bytes for source in self.sources)

    @property
    def tokens(self) -> int:
        """Of all splits, end-of-text included."""
        return self.tokens_of("train") + self.tokens_of("validation")

    def tokens_of(self, split: Split) -> int:
        return sum(source.streams[split].tokens for source in self.with_split(split))

    def with_split(self, split: Split) -> tuple[SourceRecord, ...]:
        """The sources that have documents in the split."""
        return tuple(source for source in self.sources if split in source.streams)

    def source(self, label: str) -> SourceRecord:
        """DataError for a label that no prepared source has."""
        for source in self.sources:
            if source.label == label:
                return source
        raise DataError(
            f"source {label!r}: given, but prepared are {', '.join(source.label for source in self.sources)}; "
            f"correct the label, or prepare the data again (dsllm data prepare)"
        )

    def token_dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The type of ids on disk, little-endian on any machine."""
        return np.dtype(self.dtype).newbyteorder("<")


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest type that holds every id of the vocabulary on disk, little-endian on any machine."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def read_manifest(directory: Path | str) -> Manifest:
    """The manifest of a prepared folder; DataError where there is none, or one that this version cannot read."""
    path = Path(directory) / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{directory}: no prepared data in it; run dsllm data prepare") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "content"
        raise DataError(f"{path}: unreadable ({where}: {problem['msg']}); {_PREPARE_AGAIN}") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` so that it is either whole or absent."""
    temporary = directory / f"{MANIFEST_FILE}.tmp"
    write_durably(temporary, manifest.model_dump_json(indent=1).encode("utf-8"))
    os.replace(temporary, directory / MANIFEST_FILE)


def manifest_hash(directory: Path | str) -> str:
    """SHA-256 of the manifest. It holds the checksums of everything else, so it names the data to the last bit."""
    read_manifest(directory)
    return file_sha256(Path(directory) / MANIFEST_FILE)


def verify(directory: Path | str) -> None:
    """Read every file again; DataError names those that differ from what was prepared."""
    folder = Path(directory)
    manifest = read_manifest(folder)
    of_shards = [
        _Check(name, sha256, file_sha256)
        for shard in _shards(manifest)
        for name, sha256 in ((shard.file, shard.sha256), (shard.index, shard.index_sha256))
    ]
    _refuse_changed(folder, [*_tokenizer_checks(manifest), *of_shards])


def verify_edges(directory: Path | str) -> None:
    """Read the tokenizer, and of each shard the first and last MiB; DataError names those that differ.

    Finds a shard that is another one, or was begun and never filled, at a hundredth of the reading: 2 MiB of the 200 MB
    that a shard has by default. What was changed inside of a shard, `verify` finds.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    of_shards = [
        _Check(shard.file, shard.edges_sha256, edges_sha256) for shard in _shards(manifest) if shard.edges_sha256
    ]
    _refuse_changed(folder, [*_tokenizer_checks(manifest), *of_shards])


class _Check(NamedTuple):
    """A file of the folder, and what `digest` gives for it as long as nobody changes it."""

    name: str
    sha256: str
    digest: Callable[[Path], str]


def _shards(manifest: Manifest) -> Iterator[Shard]:
    streams = (stream for source in manifest.sources for stream in source.streams.values())
    return (shard for stream in streams for shard in stream.shards)


def _tokenizer_checks(manifest: Manifest) -> list[_Check]:
    files = manifest.tokenizer_files or {TOKENIZER_FILE: manifest.tokenizer_sha256}
    return [_Check(f"{TOKENIZER_DIRECTORY}/{name}", sha256, file_sha256) for name, sha256 in files.items()]


def _refuse_changed(folder: Path, checks: Iterable[_Check]) -> None:
    changed = [check.name for check in checks if not _is_intact(folder / check.name, check)]
    if changed:
        raise DataError(f"{folder}: {', '.join(changed)} changed or went missing since preparation; {_PREPARE_AGAIN}")


def _is_intact(path: Path, check: _Check) -> bool:
    return path.is_file() and check.digest(path) == check.sha256


def folder_checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder, by its name there, in the order of names."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): file_sha256(path) for path in files}


def edges_sha256(path: Path) -> str:
    """SHA-256 of the first and the last MiB of a file, which may overlap, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(EDGE_BYTES))
        file.seek(max(0, path.stat().st_size - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class TokenShards:
    """One source's tokens in one split as one stream, memory-mapped: opening costs nothing per token."""

    def __init__(self, directory: Path, manifest: Manifest, label: str, split: Split) -> None:
        """Map the shards of a split; DataError names a file whose size is not what the manifest says."""
        self.directory = directory
        self.manifest = manifest
        self.label = label
        self.split = split
        self.stream = manifest.source(label).streams[split]
        self._shards = self.stream.shards
        self._ends = list(accumulate(shard.tokens for shard in self._shards))
        self._starts = [end - shard.tokens for end, shard in zip(self._ends, self._shards, strict=True)]
        self._arrays = [_map(directory / shard.file, manifest.token_dtype(), shard.tokens) for shard in self._shards]

    def __len__(self) -> int:
        """Tokens in the stream."""
        return self.stream.tokens

    def read(self, start: int, count: int) -> Tokens:
        """A copy of tokens `[start, start + count)` of the stream, from as many shards as they lie in."""
        tokens = np.empty(count, self.manifest.token_dtype())
        self.read_into(tokens, start)
        return tokens

    def read_into(self, row: npt.NDArray[np.integer[Any]], start: int) -> None:
        """Fill `row`, of any type that holds the ids, with the tokens of the stream from `start` on."""
        assert 0 <= start <= start + len(row) <= len(self), "tokens outside of the split"
        shard, filled = bisect_right(self._ends, start), 0
        while filled < len(row):
            offset = start + filled - self._starts[shard]
            piece = self._arrays[shard][offset : offset + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            shard, filled = shard + 1, filled + len(piece)

    def document_starts(self) -> npt.NDArray[np.int64]:
        """Position in the stream of the first token of every document, ascending."""
        return np.concatenate(
            [
                _map(self.directory / shard.index, INDEX_DTYPE, shard.documents) + start
                for shard, start in zip(self._shards, self._starts, strict=True)
            ]
        )


def _map(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    """The file as a read-only array of `count` entries; a file of another size is a DataError."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; {_PREPARE_AGAIN}") from error
    if size != count * dtype.itemsize:
        raise DataError(f"{path}: {size} bytes, but {count * dtype.itemsize} were prepared; {_PREPARE_AGAIN}")
    if count == 0:  # a shard inside one long document: no document starts in it, and nothing cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))  # a plain array: slices of a memmap cost twice as much
