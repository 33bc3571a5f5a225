"""Where a rank says what it says: rank 0 on the screen, the others of a launch in files of their own.

On many hosts the words of all would run into each other, and most would be the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dsllm.engine import last_words
from dsllm.launch.environment import LAUNCH


def log_file(logs: Path, rank: int) -> Path:
    """The log of a rank."""
    return logs / f"rank{rank}.log"


def goes_to_log(rank: int) -> bool:
    """Whether this rank is one that `dsllm launch` has started, and not the one on the screen."""
    return rank != 0 and LAUNCH in os.environ


def begin(logs: Path, rank: int) -> None:
    """An attempt begins: its last words are not yet said, and what is written to stdout and stderr goes where it
    belongs, by C libraries and child processes too."""
    last_words.forget(logs, rank)
    if not goes_to_log(rank):
        return
    logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with log_file(logs, rank).open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
