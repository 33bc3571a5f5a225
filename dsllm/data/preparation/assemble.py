"""From encoded pieces to a finished folder: joined, described by a manifest, and moved to its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

from dsllm.data.preparation.duplicates import Copies
from dsllm.data.preparation.join import Joiner
from dsllm.data.preparation.piece_store import PieceFile
from dsllm.data.preparation.pipeline import InputChangedError
from dsllm.data.preparation.recipe import Recipe, labelled_sources, prepared_fields
from dsllm.data.preparation.workplace import COPIES_FILE, SHARDS, delete_work
from dsllm.data.shards import (
    MANIFEST_FILE,
    TOKENIZER_DIRECTORY,
    Manifest,
    SourceRecord,
    folder_checksums,
    read_manifest,
    token_dtype,
    write_manifest,
)
from dsllm.data.sources.messages import describe, no_text
from dsllm.data.sources.piece import Dropped
from dsllm.data.tokenizer import check_vocabulary
from dsllm.errors import DataError, UserError
from dsllm.spec.sections import Spec


def assemble(
    spec: Spec, recipe: Recipe, staging: Path, files: Iterable[PieceFile], joiner: Joiner, *, keep: bool = False
) -> None:
    """Join the pieces and write the manifest. The pieces' own files are deleted on the way unless they are to be kept.

    `files` are those behind what is joined, but all where duplicates are dropped. Raises DataError for sources that
    gave nothing, InputChangedError where what is joined is not what lies in its place.
    """
    if spec.data.drop_duplicates:
        _join_unlike(list(files), staging, joiner)
    else:
        for file in files:
            joiner.add(file, keep=keep)
    sources = labelled_sources(spec)
    for label, source in sources.items():
        if joiner.counts(label).documents == 0:
            raise no_text(source, Dropped(joiner.counts(label).dropped))
    records = joiner.finish([describe(source) for source in sources.values()])
    _check_training_text(spec, records)
    write_manifest(staging, _manifest(spec, recipe, staging, records))


def check_joined(joiner: Joiner, files: Iterable[PieceFile]) -> None:
    """Raises InputChangedError where a piece that is joined is not the one that lies in its place now."""
    for piece, file in zip_longest(joiner.joined, files):
        if piece is None:
            return
        if file is None or not piece.is_of(file):
            raise InputChangedError


def finish(staging: Path) -> None:
    """Move everything that the manifest names from the staging folder to the one above, the manifest last.

    May be interrupted and called again: what was moved is no longer there.
    """
    manifest = read_manifest(staging)
    streams = (stream for source in manifest.sources for stream in source.streams.values())
    shards = [shard for stream in streams for shard in stream.shards]
    files = [name for shard in shards for name in (shard.file, shard.index)]
    for name in (TOKENIZER_DIRECTORY, *(f"{SHARDS}/{name}" for name in files), MANIFEST_FILE):
        source, target = staging / name, staging.parent / Path(name).name
        if source.exists():
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(source, target)
    delete_work(staging)


def reuse(spec: Spec, directory: Path) -> Manifest:
    """The manifest of a folder that was prepared from the same sections; UserError for any other."""
    manifest = read_manifest(directory)
    inputs = prepared_fields(spec)
    if changed := [name for name in inputs if inputs[name] != manifest.inputs.get(name)]:
        raise UserError(
            f"{directory}: prepared from a spec with other values of {', '.join(changed)}; "
            f"set data.directory to another folder, or delete this one"
        )
    check_vocabulary(spec, manifest.vocab_size)
    return manifest


def _join_unlike(files: list[PieceFile], staging: Path, joiner: Joiner) -> None:
    """Join all documents but those that repeat an earlier one."""
    check_joined(joiner, files)
    copies = Copies([file.path for file in files], staging / COPIES_FILE)
    for index in range(len(joiner.joined), len(files)):
        joiner.add(files[index], copies.of(index), keep=True)


def _check_training_text(spec: Spec, records: Iterable[SourceRecord]) -> None:
    num_tokens = sum(record.streams["train"].tokens for record in records if "train" in record.streams)
    if num_tokens > spec.batch.sequence_length:
        return
    fraction = spec.data.validation_fraction
    given, remedy = (
        (f"data.validation_fraction: given {fraction:g}, which leaves", "lower it, or give more text")
        if fraction
        else ("data.sources: there are", "give more text")
    )
    raise DataError(
        f"{given} {num_tokens} tokens to train on; one sample needs {spec.batch.sequence_length + 1}; {remedy}"
    )


def _manifest(spec: Spec, recipe: Recipe, staging: Path, records: tuple[SourceRecord, ...]) -> Manifest:
    return Manifest(
        inputs=prepared_fields(spec),
        dtype="uint16" if token_dtype(recipe.vocab_size).itemsize == 2 else "uint32",
        vocab_size=recipe.vocab_size,
        end_of_text_id=recipe.end_of_text_id,
        tokenizer_sha256=recipe.tokenizer_sha256,
        tokenizer_files=folder_checksums(staging / TOKENIZER_DIRECTORY),
        sources=records,
    )
