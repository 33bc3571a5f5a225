"""Names in a checkpoint folder: DeepSpeed's `global_step<N>/` and `latest`, and our file of random states."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dsllm.errors import UserError

_STEP = re.compile(r"global_step(\d+)")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the state after `step` steps lives."""
    return checkpoints / f"global_step{step}"


def step_of(folder: Path) -> int:
    """Steps done in the state of a `global_step<N>` folder."""
    match = _STEP.fullmatch(folder.name)
    if match is None:
        raise UserError(f"{folder}: not a checkpoint; its name must be global_step<N>")
    return int(match[1])


def random_state_file(folder: Path, rank: int) -> Path:
    """Random number generators of one rank."""
    return folder / f"random_states_rank{rank}.pt"


def step_folders(checkpoints: Path) -> list[Path]:
    """Every step folder, oldest first, complete or not."""
    folders = [path for path in checkpoints.glob("global_step*") if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def read_latest(checkpoints: Path) -> Path | None:
    """The folder that `latest` names; None in a folder without checkpoints.

    Raises UserError where `latest` is missing beside checkpoints or names one that is gone. DeepSpeed would return
    None and train from the start.
    """
    latest = checkpoints / "latest"
    complete = ", ".join(folder.name for folder in step_folders(checkpoints))
    if not latest.is_file():
        if not complete:
            return None
        raise UserError(f"{checkpoints}: no file `latest` beside {complete}; name one with --resume {checkpoints}/…")
    folder = checkpoints / latest.read_text().strip()
    if not folder.is_dir():
        raise UserError(
            f"{latest}: names {folder.name}, which is not there; "
            + (
                f"there are {complete}: name one with --resume {checkpoints}/…"
                if complete
                else "nothing else is either"
            )
        )
    return folder


def write_latest(checkpoints: Path, folder: Path) -> None:
    """Point `latest` to `folder` in one step: a crash leaves the old one or the new one."""
    partial = checkpoints / "latest.partial"
    with partial.open("w") as file:
        file.write(folder.name)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(checkpoints / "latest")
