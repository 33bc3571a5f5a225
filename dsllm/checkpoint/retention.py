"""Which checkpoints stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from dsllm.checkpoint.layout import complete_folders, step_folders, step_of


def remove_old(checkpoints: Path, newest: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the `keep_last` newest up to `newest`, those at multiples of `keep_every` steps, and what a killed
    save left unfinished.

    `newest` has been read back by whoever calls this, so one that is known to be good always stays. Later ones belong
    to a run that this one was turned back from; they stay until it comes to their steps.
    """
    complete = complete_folders(checkpoints)
    own = [folder for folder in complete if step_of(folder) <= step_of(newest)]
    kept = own[-keep_last:] + [folder for folder in own if keep_every and step_of(folder) % keep_every == 0]
    for folder in step_folders(checkpoints):
        if folder not in kept and (folder in own or folder not in complete):
            shutil.rmtree(folder, ignore_errors=True)
