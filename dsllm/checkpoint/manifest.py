"""What a checkpoint consists of: each file with its size and checksum, and how it was written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from dsllm.checkpoint.layout import MANIFEST_FILE, replace_durably
from dsllm.data.shards import Record, file_sha256
from dsllm.errors import CheckpointError
from dsllm.spec.sections import Precision

ANOTHER = "take another checkpoint with --resume PATH"
"""The remedy for one that cannot be used."""


class FileRecord(Record):
    """One file as it was written."""

    size_bytes: int
    sha256: str


class Manifest(Record):
    """`manifest.json` of a checkpoint."""

    step: int
    """Optimizer steps done."""
    precision: Precision
    """Of the training."""
    zero_stage: int | None
    """Stage that wrote it; None where it was converted, for any stage."""
    world_size: int | None
    """Ranks that wrote it; None where it was converted, for any number."""
    files: Mapping[str, FileRecord]
    """By the path within the checkpoint."""
    follows: str | None = None
    """What `latest` named until then."""

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(record.size_bytes for record in self.files.values())

    @property
    def origin(self) -> str:
        """`ZeRO stage 2 on 8 rank(s)`, or `any stage and number of ranks`."""
        if self.zero_stage is None:
            return "any stage and number of ranks"
        return f"ZeRO stage {self.zero_stage} on {self.world_size} rank(s)"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint. Raises CheckpointError where it cannot be read."""
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {ANOTHER}") from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: damaged: {error.errors()[0]['msg']}; {ANOTHER}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Complete a checkpoint: the last file written into it."""
    replace_durably(folder / MANIFEST_FILE, manifest.model_dump_json(indent=1) + "\n")


def record_of(path: Path) -> FileRecord:
    """A file as it is on the disk now."""
    forget_cached(path)
    return FileRecord(size_bytes=path.stat().st_size, sha256=file_sha256(path))


def fault_of(folder: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with one file of a checkpoint, in words; None where it is as it was written."""
    path = folder / name
    try:
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            return f"{name} has {size_bytes} bytes, where {record.size_bytes} were written"
        if record_of(path) != record:
            return f"{name} is damaged: its checksum is not that of what was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def forget_cached(path: Path) -> None:
    """Let the page cache forget a file that is on the disk, so that what is read next is what the disk holds."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
