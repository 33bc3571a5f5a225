"""The checkpoints of a run: in which order a resume tries them, and what a person is told of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsllm.checkpoint.layout import (
    UNIVERSAL_SUFFIX,
    complete_folders,
    is_complete,
    read_latest,
    step_folders,
    step_of,
)
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
            "step": self.manifest.step if self.manifest else step_of(self.folder),
            "zero_stage": self.manifest and self.manifest.zero_stage,
            "world_size": self.manifest and self.manifest.world_size,
            "origin": self.manifest and self.manifest.origin,
            "size_bytes": self.manifest and self.manifest.size_bytes,
            "is_latest": self.is_latest,
        }


def newest_first(checkpoints: Path) -> list[Path]:
    """The complete folders in the order in which a resume tries them: what `latest` names, then older ones.

    Newer ones come last: they are of a run that this one was turned back from; unless one says that it followed what
    `latest` names, because its save was killed on the last stretch. Without a `latest` that is there they come first.
    """
    complete = complete_folders(checkpoints)[::-1]
    latest = read_latest(checkpoints)
    if latest is None or latest not in complete:
        return complete
    at = complete.index(latest)
    followers = [folder for folder in complete[:at] if (known := _manifest(folder)) and known.follows == latest.name]
    return [*followers, *complete[at:], *(folder for folder in complete[:at][::-1] if folder not in followers)]


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
