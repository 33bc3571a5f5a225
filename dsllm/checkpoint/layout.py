"""Names in a checkpoint folder: DeepSpeed's `global_step<N>/` and `latest`, and what we put beside its files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from dsllm.errors import UserError

_STEP = re.compile(r"global_step(\d+)")
_MARKER = "complete.json"


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


def complete_folders(checkpoints: Path) -> list[Path]:
    """The step folders that every rank has finished, oldest first."""
    return [folder for folder in step_folders(checkpoints) if (folder / _MARKER).is_file()]


def mark_complete(folder: Path, step: int, world_size: int) -> None:
    """Say that every rank has finished: the last file written into a step folder."""
    _write_durably(folder / _MARKER, json.dumps({"step": step, "world_size": world_size}) + "\n")


def unmark(folder: Path) -> None:
    """Before a folder is written again: it is not complete until then."""
    (folder / _MARKER).unlink(missing_ok=True)


def world_size_of(folder: Path) -> int:
    """Ranks that wrote a complete step folder."""
    return int(json.loads((folder / _MARKER).read_text())["world_size"])


def read_latest(checkpoints: Path) -> Path | None:
    """The folder that `latest` names; None in a folder without a complete checkpoint.

    Raises UserError where `latest` is missing beside checkpoints or names one that is gone or not complete. DeepSpeed
    would return None and train from the start.
    """
    latest = checkpoints / "latest"
    complete = complete_folders(checkpoints)
    names = ", ".join(folder.name for folder in complete)
    remedy = f"there are {names}: name one with --resume {checkpoints}/…" if complete else "nothing else is either"
    if not latest.is_file():
        if not complete:
            return None
        raise UserError(f"{checkpoints}: there is no file named latest; {remedy}")
    folder = checkpoints / latest.read_text().strip()
    if not folder.is_dir():
        raise UserError(f"{latest}: names {folder.name}, which is not there; {remedy}")
    if folder not in complete:
        raise UserError(f"{latest}: names {folder.name}, which is not complete; {remedy}")
    return folder


def write_latest(checkpoints: Path, folder: Path) -> None:
    """Point `latest` to `folder`."""
    _write_durably(checkpoints / "latest", folder.name)


def _write_durably(path: Path, text: str) -> None:
    """In one step: a crash leaves the old content or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
