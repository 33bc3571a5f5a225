"""Which checkpoints stay."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from dsllm.checkpoint.layout import complete_folders, remove, step_folders, step_of
from dsllm.plan.cost import room_for_checkpoints
from dsllm.units import format_bytes

logger = logging.getLogger(__name__)


def foretell_room(checkpoints: Path, each_bytes: int, keep_last: int) -> None:
    """Before the first step, warn where the disk will not hold what the spec keeps."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(checkpoints).free
    missing, needed_bytes = room_for_checkpoints(len(complete_folders(checkpoints)), each_bytes, keep_last)
    if free_bytes < needed_bytes:
        logger.warning(
            "%s: %s free, and the run comes to need %s for %d checkpoints of %s; make room, or lower "
            "checkpoint.keep_last",
            checkpoints,
            format_bytes(free_bytes),
            format_bytes(needed_bytes),
            missing,
            format_bytes(each_bytes),
        )


def remove_old(checkpoints: Path, newest: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all up to `newest` but the `keep_last` newest and those at multiples of `keep_every` steps, and with them
    what killed saves left unfinished.

    `newest` has been read back by whoever calls this, so one that is known to be good always stays. Later ones belong
    to a run that this one was turned back from; they stay until it comes to their steps.
    """
    own = [folder for folder in complete_folders(checkpoints) if step_of(folder) <= step_of(newest)]
    kept = own[-keep_last:] + [folder for folder in own if keep_every and step_of(folder) % keep_every == 0]
    for folder in step_folders(checkpoints):
        if folder not in kept and step_of(folder) <= step_of(newest):
            remove(folder)
