"""Prepared folders that the data tests make without preparing anything: documents of given tokens, by source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from dsllm.data.preparation.shard_writer import ShardWriter
from dsllm.data.shards import (
    TOKENIZER_DIRECTORY,
    Manifest,
    SourceRecord,
    Split,
    StreamRecord,
    TokenShards,
    file_sha256,
    folder_checksums,
    write_manifest,
)

END_OF_TEXT = 0


def numbered_documents(lengths: Iterable[int], first: int = 1) -> list[list[int]]:
    """Documents of these lengths, end-of-text included, in which no other token occurs twice."""
    documents = []
    for length in lengths:
        documents.append([*range(first, first + length - 1), END_OF_TEXT])
        first += length - 1
    return documents


def write_folder(
    folder: Path,
    sources: Mapping[str, Mapping[Split, Sequence[Sequence[int]]]],
    shard_tokens: int = 1024,
    dtype: str = "uint16",
) -> Manifest:
    """A folder of these documents: of each source, by its label, and split. Its tokenizer is none that encodes."""
    tokenizer = folder / TOKENIZER_DIRECTORY / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.write_text("{}")
    (tokenizer.parent / "sentencepiece.model").write_bytes(b"pieces")
    records = [_write_source(folder, label, splits, shard_tokens, dtype) for label, splits in sources.items()]
    manifest = Manifest(
        inputs={},
        dtype=dtype,
        vocab_size=2**16 if dtype == "uint16" else 2**32,
        end_of_text_id=END_OF_TEXT,
        tokenizer_sha256=file_sha256(tokenizer),
        tokenizer_files=folder_checksums(tokenizer.parent),
        sources=tuple(records),
    )
    write_manifest(folder, manifest)
    return manifest


def open_stream(folder: Path, documents: Sequence[Sequence[int]], shard_tokens: int = 1024) -> TokenShards:
    """The training stream of a folder of one source with these documents."""
    manifest = write_folder(folder, {"text": {"train": documents}}, shard_tokens)
    return TokenShards(folder, manifest, "text", "train")


def _write_source(
    folder: Path, label: str, splits: Mapping[Split, Sequence[Sequence[int]]], shard_tokens: int, dtype: str
) -> SourceRecord:
    streams: dict[Split, StreamRecord] = {}
    for split, documents in splits.items():
        with ShardWriter(folder, f"{label}-{split}", np.dtype(dtype), shard_tokens) as writer:
            writer.write(
                np.concatenate([np.array(document) for document in documents]),
                np.cumsum([0, *map(len, documents)])[:-1],
            )
            streams[split] = writer.finish()
    return SourceRecord(
        label=label,
        source=f"text source '{label}'",
        documents=sum(stream.documents for stream in streams.values()),
        text_bytes=0,
        dropped={},
        streams=streams,
    )
