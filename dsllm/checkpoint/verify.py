"""Whether a checkpoint is what was written, before a weight is loaded from it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as distributed

from dsllm.checkpoint.layout import is_complete
from dsllm.checkpoint.manifest import fault_of, read_manifest
from dsllm.engine import ranks
from dsllm.errors import CheckpointError

logger = logging.getLogger(__name__)


def faults_of(checkpoint: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with a checkpoint, a sentence for each file; of its files every `shares`-th from `share` on."""
    try:
        if not is_complete(checkpoint):
            return ["not complete: its save was interrupted"]
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]
    # The largest first, so that the shares are about equal.
    files = sorted(manifest.files.items(), key=lambda item: (-item[1].size_bytes, item[0]))
    faults = [fault_of(checkpoint, name, record) for name, record in files[share::shares]]
    return [fault for fault in faults if fault is not None]


def first_sound(candidates: list[Path]) -> Path | None:
    """The first checkpoint without faults, and a warning for each before it; None without candidates. Collective.

    The ranks share the files, so that each reads about as much as it will load. Raises CheckpointError where none of
    the candidates is sound.
    """
    told = []
    for checkpoint in candidates:
        of_ranks = ranks.gather(faults_of(checkpoint, distributed.get_rank(), distributed.get_world_size()))
        faults = sorted({fault for of_rank in of_ranks for fault in of_rank})
        if not faults:
            return checkpoint
        told.append(f"{checkpoint}: {faults[0]}" + (f", and {len(faults) - 1} more" if len(faults) > 1 else ""))
        if checkpoint is not candidates[-1]:
            logger.warning("%s; going back to the one before", told[-1])
    if not told:
        return None
    raise CheckpointError(
        f"{told[-1]}; no other checkpoint is sound" if len(told) > 1 else f"{told[-1]}; name another with --resume PATH"
    )
