"""From text to token shards: a folder that is either complete or absent, made by however many attempts."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from dsllm.data.preparation.duplicates import Copies
from dsllm.data.preparation.encode import encoder, is_much
from dsllm.data.preparation.join import Joiner
from dsllm.data.preparation.piece_store import PieceFile
from dsllm.data.preparation.pipeline import InputChangedError, Pipeline, Progress, size_of
from dsllm.data.preparation.recipe import Recipe, labelled_sources, prepared_fields, settle_recipe
from dsllm.data.preparation.workplace import PIECES, STAGING, move_up, refuse_foreign_files, start_over, workplace
from dsllm.data.shards import (
    MANIFEST_FILE,
    TOKENIZER_DIRECTORY,
    Manifest,
    SourceRecord,
    read_manifest,
    token_dtype,
    write_manifest,
)
from dsllm.data.sources.catalogue import open_source
from dsllm.data.sources.messages import describe, no_text
from dsllm.data.sources.piece import Dropped, OpenSource
from dsllm.data.tokenizer import check_vocabulary
from dsllm.errors import DataError, UserError
from dsllm.spec.sections import Spec

logger = logging.getLogger(__name__)

SHARDS = "shards"

Report = Callable[[Progress], None]


def default_directory(spec: Spec) -> Path:
    """Where the spec's prepared data lives."""
    return Path(spec.data.directory or f"data/{spec.name}").expanduser()


def prepare(
    spec: Spec,
    directory: Path | str,
    *,
    processes: int | None = None,
    skip_bad_lines: bool = False,
    on_progress: Report | None = None,
) -> Manifest:
    """Make the spec's tokenizer and token shards in `directory`, or reuse them where they are already there.

    `processes` tokenize (as many as cores when None); the bytes written do not depend on it, nor on how often
    preparation was interrupted. `on_progress` is called every now and then. Raises UserError for a folder that holds
    something else or a full disk, DataError for sources that cannot be used, DsllmError for a disk that fails; no
    half-made shard is left in the folder, and finished work is kept in its `.partial` for the next attempt.
    """
    target = Path(directory)
    staging = target / STAGING
    if (target / MANIFEST_FILE).is_file():
        shutil.rmtree(staging, ignore_errors=True)  # left by one that was killed while it tidied up
        return reuse(spec, target)
    refuse_foreign_files(target)
    report = on_progress or (lambda progress: None)
    with workplace(staging, prepared_fields(spec)):
        if not (staging / MANIFEST_FILE).is_file():
            try:
                _write_shards(spec, staging, processes or num_cores(), skip_bad_lines, report)
            except InputChangedError:
                logger.warning("%s: sources changed since preparation was interrupted; starting over", target)
                start_over(staging)
                _write_shards(spec, staging, processes or num_cores(), skip_bad_lines, report)
        finish(staging)
    return read_manifest(target)


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


def open_sources(spec: Spec, *, skip_bad_lines: bool = False) -> dict[str, OpenSource]:
    """Every source, opened before anything is read, so that one that is missing is told at once.

    Those that are only validated on come first: of documents with the same text, the first is kept.
    """
    sources = labelled_sources(spec)
    validated_first = sorted(sources, key=lambda label: label not in list(sources)[len(spec.data.sources) :])
    return {label: open_source(sources[label], skip_bad_lines=skip_bad_lines) for label in validated_first}


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_shards(spec: Spec, staging: Path, processes: int, skip_bad_lines: bool, report: Report) -> None:
    """All that the manifest names, and the manifest, in the staging folder."""
    report(Progress())
    sources = open_sources(spec, skip_bad_lines=skip_bad_lines)
    with encoder(processes, much=is_much(size_of(sources))) as encode:
        recipe = settle_recipe(spec, staging, skip_bad_lines=skip_bad_lines)
        with Joiner(staging / SHARDS, recipe.routing(spec)) as joiner:
            # Copies are found among all documents, so that no piece is joined before the last one is there.
            joined = () if spec.data.drop_duplicates else joiner.joined
            pipeline = Pipeline(sources, staging / PIECES, joined=joined, on_progress=report)
            join(spec, recipe, staging, pipeline.run(encode, recipe.encoding(spec, staging)), joiner)


def join(
    spec: Spec, recipe: Recipe, staging: Path, files: Iterable[PieceFile], joiner: Joiner, *, keep: bool = False
) -> None:
    """Join the pieces and write the manifest. The pieces' own files are deleted on the way unless they are to be kept.

    `files` are those behind what is joined, but all where duplicates are dropped. Raises DataError for sources that
    gave nothing.
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
    write_manifest(staging, _manifest(spec, recipe, records))


def _join_unlike(files: list[PieceFile], staging: Path, joiner: Joiner) -> None:
    """Join all documents but those that repeat an earlier one."""
    if any(not piece.is_of(file) for piece, file in zip(joiner.joined, files, strict=False)):
        raise InputChangedError
    copies = Copies([file.path for file in files], staging / "copies")
    for index in range(len(joiner.joined), len(files)):
        joiner.add(files[index], copies.of(index), keep=True)


def _check_training_text(spec: Spec, records: Iterable[SourceRecord]) -> None:
    num_tokens = sum(record.streams["train"].tokens for record in records if "train" in record.streams)
    if num_tokens <= spec.batch.sequence_length:
        raise DataError(
            f"data.validation_fraction: given {spec.data.validation_fraction:g}, which leaves {num_tokens} tokens to "
            f"train on; one sample needs {spec.batch.sequence_length + 1}; lower it, or give more text"
        )


def _manifest(spec: Spec, recipe: Recipe, records: tuple[SourceRecord, ...]) -> Manifest:
    return Manifest(
        inputs=prepared_fields(spec),
        dtype="uint16" if token_dtype(recipe.vocab_size).itemsize == 2 else "uint32",
        vocab_size=recipe.vocab_size,
        end_of_text_id=recipe.end_of_text_id,
        tokenizer_sha256=recipe.tokenizer_sha256,
        sources=records,
    )


def finish(staging: Path) -> None:
    """Move everything that the manifest names to its place, the manifest last."""
    manifest = read_manifest(staging)
    streams = (stream for source in manifest.sources for stream in source.streams.values())
    shards = [shard for stream in streams for shard in stream.shards]
    files = [name for shard in shards for name in (shard.file, shard.index)]
    move_up(staging, [TOKENIZER_DIRECTORY, *(f"{SHARDS}/{name}" for name in files)])
