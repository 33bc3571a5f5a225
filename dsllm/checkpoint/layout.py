"""Names in a checkpoint folder: DeepSpeed's `global_step<N>/` and `latest`, and what we put beside its files."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from dsllm.data.shards import write_durably
from dsllm.errors import UserError

MANIFEST_FILE = "manifest.json"
"""The last file that is written into a step folder: without it the checkpoint is not complete."""
LATEST_FILE = "latest"
UNIVERSAL_SUFFIX = "_universal"

_STEP = re.compile(r"global_step(\d+)")
_STEP_OR_UNIVERSAL = re.compile(rf"global_step(\d+)(?:{UNIVERSAL_SUFFIX})?")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the state after `step` steps lives."""
    return checkpoints / f"global_step{step}"


def universal_folder(step_folder: Path) -> Path:
    """Where a checkpoint goes that was converted for any stage and number of ranks."""
    return step_folder.with_name(step_folder.name + UNIVERSAL_SUFFIX)


def step_of(folder: Path) -> int:
    """Steps done in the state of a `global_step<N>` folder, converted or not."""
    match = _STEP_OR_UNIVERSAL.fullmatch(folder.name)
    if match is None:
        raise UserError(f"{folder}: not a checkpoint; its name must be global_step<N>")
    return int(match[1])


def random_state_file(folder: Path, rank: int) -> Path:
    """Random number generators of one rank."""
    return folder / f"random_states_rank{rank}.pt"


def fragments_file(folder: Path, rank: int) -> Path:
    """Which parts of which parameters one rank's optimizer file holds: see fragments.py."""
    return folder / f"fragments_rank{rank}.json"


def run_folder_of(checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to; a converted one that was put elsewhere brings what is needed of it."""
    return checkpoint if (checkpoint / "spec.yaml").is_file() else checkpoint.resolve().parent.parent


def step_folders(checkpoints: Path) -> list[Path]:
    """Every step folder as DeepSpeed writes it, oldest first, complete or not."""
    folders = [path for path in checkpoints.glob("global_step*") if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def is_complete(folder: Path) -> bool:
    """Whether every rank has finished writing it."""
    return (folder / MANIFEST_FILE).is_file()


def complete_folders(checkpoints: Path) -> list[Path]:
    """The step folders that every rank has finished, oldest first."""
    return [folder for folder in step_folders(checkpoints) if is_complete(folder)]


def read_latest(checkpoints: Path) -> Path | None:
    """The folder that `latest` names, whether it is there or not; None without a file of that name."""
    latest = checkpoints / LATEST_FILE
    return checkpoints / latest.read_text().strip() if latest.is_file() else None


def remove(folder: Path) -> None:
    """Delete a checkpoint so that it is not complete from the first moment on, whenever this is cut short."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_latest(checkpoints: Path, folder: Path) -> None:
    """Point `latest` to `folder`."""
    replace_durably(checkpoints / LATEST_FILE, folder.name)


def replace_durably(path: Path, text: str) -> None:
    """In one step, and on the disk when this returns: a crash leaves the old content or the new one."""
    partial = path.with_name(path.name + ".partial")
    write_durably(partial, text.encode())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: without it a new or renamed file may be gone after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
