"""What a rank that fails leaves in the run's folder, for whoever looks after the run: why it ended.

Nothing heavy is imported here: a rank may fail before it has come to torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dsllm.errors import Cause, DsllmError
from dsllm.launch.environment import LAUNCH

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_CONNECTION = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT}
_BACKENDS = ("NCCL", "gloo")
"""Words in the messages of torch's RuntimeErrors."""


def file_of(logs: Path, rank: int) -> Path:
    """Where a rank leaves its last words."""
    return logs / f"rank{rank}.ended.json"


def forget(logs: Path, rank: int) -> None:
    """Remove what an earlier attempt has left. A disk that does not let it is met, and told, soon enough."""
    with contextlib.suppress(OSError):
        file_of(logs, rank).unlink(missing_ok=True)


def write(logs: Path, rank: int, cause: Cause, exit_status: int, message: str, *, is_own: bool) -> None:
    """Leave why this rank ends; `is_own` is false where it does only because another one failed, with `message`.

    Whole or not at all. It never raises: a disk that is full must not hide the error that comes first. Outside of a
    launch nothing is made for it: a start that is refused leaves no folder behind.
    """
    words = {
        "launch": os.environ.get(LAUNCH),
        "time": time.time(),
        "rank": rank,
        "host": socket.gethostname(),
        "cause": cause,
        "exit_status": exit_status,
        "message": message,
        "is_own": is_own,
    }
    with contextlib.suppress(Exception):
        if LAUNCH in os.environ:
            logs.mkdir(parents=True, exist_ok=True)
        path = file_of(logs, rank)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(words) + "\n")
        partial.replace(path)


def write_error(logs: Path | None, rank: int | None, error: Exception) -> None:
    """Leave that this rank ends by `error`, where it knows already which it is and in what run."""
    if logs is None or rank is None:
        return
    is_known = isinstance(error, DsllmError)
    write(
        logs,
        rank,
        cause_of(error),
        error.exit_code if is_known else 1,
        str(error) if is_known else f"{type(error).__name__}: {error}",
        is_own=error.is_own if is_known else True,
    )


def cause_of(error: BaseException) -> Cause:
    """Why: what an error of dsllm's says, else what the error is, or one that it came from."""
    for each in _chain(error):
        if isinstance(each, DsllmError):
            if each.cause != "fault" or "cause" in vars(each):  # said of this very error
                return each.cause
        elif _is_exhaustion(each):
            return "out_of_memory"
        elif isinstance(each, OSError) and each.errno in _DISK:
            return "disk"
        elif _is_communication(each):
            return "communication"
    return "fault"


def _is_communication(error: BaseException) -> bool:
    """Whether torch, NCCL, gloo or the system say that the network, or another rank, no longer answers."""
    # by name: torch.distributed may not be there yet, and need not be imported for this
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__) or isinstance(error, ConnectionError):
        return True
    if isinstance(error, OSError):
        return error.errno in _CONNECTION
    return isinstance(error, RuntimeError) and any(backend in str(error) for backend in _BACKENDS)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_exhaustion(error: BaseException) -> bool:
    if "torch" not in sys.modules or not isinstance(error, Exception):
        return isinstance(error, MemoryError)
    from dsllm.engine.exhausted import is_exhaustion

    return is_exhaustion(error)
