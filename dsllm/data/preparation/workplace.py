"""The folder in which preparation works: its own until it is done, kept when it is interrupted."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsllm.data.preparation.piece_store import BadPieceError, remove_temporaries
from dsllm.data.shards import MANIFEST_FILE, write_durably
from dsllm.errors import DsllmError, UserError

logger = logging.getLogger(__name__)

STAGING = ".partial"
PIECES = "pieces"
PART_FILE = "part.json"
SETTINGS_FILE = "settings.json"
_LOCK_FILE = "lock"


@contextmanager
def workplace(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold `folder` while the block works in it. What lies there from other `settings` is deleted first.

    When the block fails, finished pieces stay for the next attempt; a folder without any is deleted. Raises UserError
    where another process works in it or the disk is full, DsllmError for other faults of the disk.
    """
    made = [path for path in folder.parents if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            remove_temporaries(folder / PIECES)
            _start_over_where_changed(folder, settings)
            try:
                yield
            finally:
                if not has_finished_work(folder):
                    shutil.rmtree(folder, ignore_errors=True)
    except BadPieceError as error:
        Path(str(error)).unlink(missing_ok=True)
        remedy = "the same command" if folder in Path(str(error)).parents else "prepare that part again, which"
        raise DsllmError(f"{error}: damaged, and deleted; {remedy} makes it again and goes on") from error
    except OSError as error:
        raise _disk_error(folder, error) from error
    finally:
        with suppress(OSError):  # not empty, which is the usual case
            for path in made:
                path.rmdir()


def has_finished_work(folder: Path) -> bool:
    """Whether there is anything that a next attempt can use."""
    finished = any((folder / name).exists() for name in (MANIFEST_FILE, PART_FILE))
    return finished or any((folder / PIECES).rglob("*.npz")) or any(folder.glob("shards/*.bin*"))


def refuse_foreign_files(directory: Path) -> None:
    """UserError for a folder with files but neither a manifest nor work of ours: it is somebody's."""
    if directory.is_dir() and not (directory / STAGING).exists():
        foreign = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
        if foreign:
            raise UserError(
                f"{directory}: holds {foreign[0]}, which dsllm did not prepare; set data.directory to an empty folder"
            )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / _LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another process prepares data there; wait for it, or set data.directory to another folder"
            ) from error
        yield


def _start_over_where_changed(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / SETTINGS_FILE
    text = json.dumps(settings, sort_keys=True)
    if file.is_file() and file.read_text() == text:
        return
    if has_finished_work(folder):
        logger.warning("%s: begun with other settings; starting over", folder)
    start_over(folder)
    write_durably(file, text.encode())


def start_over(folder: Path) -> None:
    """Delete everything but what holds the folder."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (_LOCK_FILE, SETTINGS_FILE):
            path.unlink()


def _disk_error(folder: Path, error: OSError) -> DsllmError:
    directory = folder.parent if folder.name == STAGING else folder
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{directory}: the disk is full; nothing that was finished is lost: free some space and give the same "
            f"command again, or set data.directory elsewhere"
        )
    return DsllmError(f"{directory}: preparing failed ({error}); mend that, or set data.directory elsewhere")


def move_up(staging: Path, names: list[str]) -> None:
    """Move the finished files of a staging folder, and `MANIFEST_FILE` last, to the folder above; delete the staging.

    May be interrupted and called again: what was moved is no longer there.
    """
    for name in [*names, MANIFEST_FILE]:
        source, target = staging / name, staging.parent / Path(name).name
        if source.exists():
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(source, target)
    shutil.rmtree(staging, ignore_errors=True)
