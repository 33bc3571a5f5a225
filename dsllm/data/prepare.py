"""From text to token shards: the tokenizer, the held-out split, and a folder that is either complete or absent."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dsllm.data.encode import Batch, EncodedDocument, encoder
from dsllm.data.shard_writer import ShardWriter
from dsllm.data.shards import (
    MANIFEST_FILE,
    TOKENIZER_DIRECTORY,
    Manifest,
    SourceCounts,
    Split,
    SplitRecord,
    file_sha256,
    read_manifest,
    write_manifest,
)
from dsllm.data.sources import describe, documents
from dsllm.data.tokenizer import TOKENIZER_FILE, build_tokenizer, check_vocabulary, token_count
from dsllm.errors import DataError, DsllmError, UserError
from dsllm.spec.sections import Data, Source, Spec

_STAGING = ".partial"
_HASHES = 2**64


@dataclass(frozen=True)
class Progress:
    """How far preparation has come. All zero while the tokenizer is being made."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0


def default_directory(spec: Spec) -> Path:
    """Where the spec's prepared data lives."""
    return Path(spec.data.directory or f"data/{spec.name}").expanduser()


def prepare(
    spec: Spec,
    directory: Path | str,
    *,
    processes: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Make the spec's tokenizer and token shards in `directory`, or reuse them where they are already there.

    `processes` tokenize (as many as cores when None); the bytes written do not depend on it. `on_progress` is called
    every now and then. Raises UserError for a folder that holds something else, DataError for sources that cannot be
    used, DsllmError for a disk that fails; nothing half-made is left in the folder.
    """
    target = Path(directory)
    report = on_progress or (lambda progress: None)
    if (target / MANIFEST_FILE).is_file():
        return _reuse(spec, target)
    _refuse_unequal_weights(spec.data)
    with _staging(target) as staging:
        report(Progress())
        threshold = validation_threshold(spec.data)
        manifest = _write(spec, staging, threshold, processes or _num_cores(), report)
    return manifest


def validation_threshold(data: Data) -> int:
    """Documents whose `identity_hash` is below this number are held out.

    It is the fraction of all hashes, moved just enough that a small source gives each split a document. Reads only
    until both splits have one. DataError where there are not two documents to share out.
    """
    threshold = int(data.validation_fraction * _HASHES)
    lowest, highest = _HASHES, -1
    for document in chain.from_iterable(documents(source) for source in data.sources):
        value = identity_hash(document.identity)
        lowest, highest = min(lowest, value), max(highest, value)
        if lowest < threshold <= highest:
            return threshold
    if lowest == highest:
        raise DataError(
            "data.sources: given 1 document; one must be trained on and another held out for validation; "
            "split the text into several files"
        )
    return lowest + 1 if lowest >= threshold else highest


def identity_hash(identity: str) -> int:
    """A number below 2**64 that depends on the identity alone, on any machine."""
    return int.from_bytes(hashlib.blake2b(identity.encode("utf-8"), digest_size=8).digest(), "little")


def _reuse(spec: Spec, directory: Path) -> Manifest:
    """The manifest of a folder that was prepared from the same sections; UserError for any other."""
    manifest = read_manifest(directory)
    inputs = _inputs(spec)
    if changed := [name for name in inputs if inputs[name] != manifest.inputs.get(name)]:
        raise UserError(
            f"{directory}: prepared from a spec with other values of {', '.join(changed)}; "
            f"set data.directory to another folder, or delete this one"
        )
    check_vocabulary(spec, manifest.vocab_size)
    return manifest


def _inputs(spec: Spec) -> dict[str, Any]:
    """The fields that decide the prepared bytes, by their names in the spec. Where the folder lies is not one."""
    sections = {
        "tokenizer": spec.tokenizer.model_dump(mode="json"),
        "data": spec.data.model_dump(mode="json", exclude={"directory"}),
    }
    return {f"{section}.{key}": value for section, fields in sections.items() for key, value in fields.items()}


def _refuse_unequal_weights(data: Data) -> None:
    weights = [source.weight for source in data.sources]
    if len(set(weights)) > 1:
        raise UserError(
            f"data.sources: given the weights {', '.join(f'{weight:g}' for weight in weights)}; every source is taken "
            f"as it is, mixing by weight is not supported yet; give all sources the same weight"
        )


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A folder inside `directory` to write in. Its content moves up when the block ends well, the manifest last; when
    the block fails it is deleted. What an interrupted preparation left is deleted first."""
    staging = directory / _STAGING
    _refuse_foreign_files(directory)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        _move_up(staging)
    except OSError as error:
        raise DsllmError(
            f"{directory}: preparing failed ({error}); nothing was kept; mend that, or set data.directory elsewhere"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # not empty, which is the usual case, or never made
            directory.rmdir()


def _refuse_foreign_files(directory: Path) -> None:
    """A folder with files but neither a manifest nor a staging folder of ours is somebody's."""
    if directory.is_dir() and not (directory / _STAGING).exists():
        foreign = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
        if foreign:
            raise UserError(
                f"{directory}: holds {foreign[0]}, which dsllm did not prepare; set data.directory to an empty folder"
            )


def _move_up(staging: Path) -> None:
    for path in sorted(staging.iterdir(), key=lambda path: path.name == MANIFEST_FILE):
        target = staging.parent / path.name
        if target.is_dir():  # left by a preparation that was killed while it moved
            shutil.rmtree(target)
        os.replace(path, target)


def _write(spec: Spec, directory: Path, threshold: int, processes: int, report: Callable[[Progress], None]) -> Manifest:
    tokenizer = build_tokenizer(spec, directory / TOKENIZER_DIRECTORY)
    tokenizer_file = directory / TOKENIZER_DIRECTORY / TOKENIZER_FILE
    vocab_size = token_count(tokenizer)
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    with (
        ShardWriter(directory, "train", dtype, spec.data.shard_tokens) as train,
        ShardWriter(directory, "validation", dtype, spec.data.shard_tokens) as validation,
        encoder(tokenizer_file, tokenizer.eos_token_id, processes) as encode,
    ):
        writers = _Writers(train, validation, threshold)
        milestones = [Progress()]
        for source in spec.data.sources:
            milestones.append(_write_source(encode(documents(source)), writers, milestones[-1], report))
        splits: dict[Split, SplitRecord] = {"train": train.finish(), "validation": validation.finish()}
    manifest = Manifest(
        inputs=_inputs(spec),
        dtype="uint16" if dtype == np.uint16 else "uint32",
        vocab_size=vocab_size,
        end_of_text_id=tokenizer.eos_token_id,
        tokenizer_sha256=file_sha256(tokenizer_file),
        sources=tuple(map(_source_counts, spec.data.sources, milestones, milestones[1:])),
        splits=splits,
        **asdict(milestones[-1]),
    )
    write_manifest(directory, manifest)
    return manifest


@dataclass(frozen=True)
class _Writers:
    """The two splits, and the rule that tells them apart."""

    train: ShardWriter
    validation: ShardWriter
    threshold: int

    def write(self, document: EncodedDocument) -> None:
        split = self.validation if identity_hash(document.identity) < self.threshold else self.train
        split.write(document.ids)


def _write_source(
    batches: Iterable[Batch], writers: _Writers, progress: Progress, report: Callable[[Progress], None]
) -> Progress:
    """Write the documents of one source after `progress`; the progress after it."""
    for batch in batches:
        for document in batch:
            writers.write(document)
        progress = Progress(
            documents=progress.documents + len(batch),
            text_bytes=progress.text_bytes + sum(document.text_bytes for document in batch),
            tokens=progress.tokens + sum(len(document.ids) for document in batch),
        )
        report(progress)
    return progress


def _source_counts(source: Source, before: Progress, after: Progress) -> SourceCounts:
    return SourceCounts(
        source=describe(source),
        documents=after.documents - before.documents,
        text_bytes=after.text_bytes - before.text_bytes,
    )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
