"""The checkpoints of a run as a person asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsllm.checkpoint.layout import UNIVERSAL_SUFFIX, is_complete, newest_first, step_folders, step_of
from dsllm.checkpoint.manifest import Manifest, read_manifest
from dsllm.errors import CheckpointError, UserError


@dataclass(frozen=True)
class Entry:
    """One checkpoint."""

    folder: Path
    manifest: Manifest | None
    """None where it is not complete, or its manifest is damaged."""
    is_latest: bool
    """Whether a resume tries it first."""

    def as_json(self) -> dict[str, Any]:
        """What `dsllm checkpoints --json` says of it."""
        return {
            "name": self.folder.name,
            "path": str(self.folder),
            "step": step_of(self.folder),
            "zero_stage": self.manifest and self.manifest.zero_stage,
            "world_size": self.manifest and self.manifest.world_size,
            "origin": self.manifest and self.manifest.origin,
            "size_bytes": self.manifest and self.manifest.size_bytes,
            "is_latest": self.is_latest,
        }


def checkpoints_of(path: Path) -> list[Entry]:
    """Every checkpoint of a run (or of its `checkpoints` folder), oldest first, complete or not; one alone where `path`
    is one. Raises UserError where there is none.
    """
    if is_complete(path):
        return [Entry(path, _manifest(path), is_latest=False)]
    for checkpoints in (path, path / "checkpoints"):
        folders = [*step_folders(checkpoints), *sorted(checkpoints.glob(f"global_step*{UNIVERSAL_SUFFIX}"))]
        if folders:
            first = next(iter(newest_first(checkpoints)), None)
            return [Entry(folder, _manifest(folder), folder == first) for folder in folders]
    raise UserError(f"{path}: no checkpoint there; give a run, its checkpoints, or a global_step<N> folder")


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except CheckpointError:
        return None
