"""The folder in which preparation works: its own until it is done, kept when it is interrupted."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsllm.data.preparation.piece_store import BadPieceError, remove_temporaries
from dsllm.data.shards import MANIFEST_FILE, TOKENIZER_DIRECTORY, write_durably
from dsllm.data.sources.piece import PIECE_BYTES
from dsllm.errors import DsllmError, UserError

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Raised when pieces or their joining change, so that an attempt of another version is not gone on with."""

STAGING = ".partial"
PIECES = "pieces"
SHARDS = "shards"
PART_FILE = "part.json"
RECIPE_FILE = "recipe.json"
COPIES_FILE = "copies"
_SETTINGS_FILE = "settings.json"
_LOCK_FILE = "lock"
_WORK = (PIECES, SHARDS, TOKENIZER_DIRECTORY, RECIPE_FILE, COPIES_FILE, MANIFEST_FILE, PART_FILE)
"""All that preparation makes in a workplace, and all that it ever deletes there."""

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def workplace(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold `folder` while the block works in it.

    When the block fails, finished pieces stay for the next attempt; a folder without any is deleted. Raises UserError
    for a folder that holds something else, or work that was begun with other `settings`; where another process works
    in it; where the disk is full. DsllmError for other faults of the disk.
    """
    settings = {"preparation.format": _FORMAT, "preparation.piece_bytes": PIECE_BYTES, **settings}
    made = [path for path in folder.parents if not path.exists()]
    try:
        _refuse_other_files(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            remove_temporaries(folder / PIECES)
            _begin(folder, settings)
            try:
                yield
            finally:
                if not has_finished_work(folder):
                    delete_work(folder)
    except BadPieceError as error:
        Path(str(error)).unlink(missing_ok=True)
        raise DsllmError(f"{error}: damaged, and deleted; prepare that part again, which makes it again") from error
    except OSError as error:
        raise _disk_error(folder, error) from error
    finally:
        with suppress(OSError):  # not empty, which is the usual case
            for path in made:
                path.rmdir()


def has_finished_work(folder: Path) -> bool:
    """Whether there is anything that a next attempt can use."""
    finished = any((folder / name).exists() for name in (MANIFEST_FILE, PART_FILE))
    return finished or any((folder / PIECES).rglob("*.npz")) or any((folder / SHARDS).glob("*.bin*"))


def start_over(folder: Path) -> None:
    """Delete what was made so far."""
    for name in _WORK:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def refuse_foreign_files(directory: Path) -> None:
    """UserError for a folder with files but neither a manifest nor work of ours: it is somebody's."""
    if directory.is_dir() and not (directory / STAGING).exists():
        _refuse(directory, [path.name for path in directory.iterdir() if not path.name.startswith(".")])


def _refuse_other_files(folder: Path) -> None:
    """UserError for a folder that is no workplace."""
    if folder.is_dir() and not (folder / _SETTINGS_FILE).is_file():
        _refuse(folder, [path.name for path in folder.iterdir() if path.name != _LOCK_FILE])


def _refuse(folder: Path, names: list[str]) -> None:
    if names:
        raise UserError(f"{folder}: holds {min(names)}, which dsllm did not prepare; choose an empty folder")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / _LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another process prepares data there; wait for it, or set data.directory to another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s: this file system has no locks; start no second preparation there", folder)
        yield


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Go on with work of the same settings, or begin. UserError where there is other work: it is not ours to lose."""
    file = folder / _SETTINGS_FILE
    earlier = _read(file)
    if earlier == settings:
        return
    if has_finished_work(folder):
        changed = [name for name in settings if settings[name] != earlier.get(name)]
        raise UserError(
            f"{folder}: begun with other values of {', '.join(changed)}; set them back to go on there, delete the "
            f"folder, or set data.directory to another one"
        )
    start_over(folder)
    write_durably(file, json.dumps(settings, sort_keys=True).encode())


def _read(file: Path) -> dict[str, Any]:
    """Settings that were written; none where there is no file, or one that a power cut left unfinished."""
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
        return settings
    except (FileNotFoundError, ValueError):
        return {}


def delete_work(folder: Path) -> None:
    """Delete the folder with all that preparation made in it, and nothing else."""
    start_over(folder)
    for name in (_SETTINGS_FILE, _LOCK_FILE):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # something else came into it
        folder.rmdir()


def _disk_error(folder: Path, error: OSError) -> DsllmError:
    directory = folder.parent if folder.name == STAGING else folder
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{directory}: the disk is full; nothing that was finished is lost: free some space and give the same "
            f"command again, or set data.directory elsewhere"
        )
    return DsllmError(f"{directory}: preparing failed ({error}); mend that, or set data.directory elsewhere")
