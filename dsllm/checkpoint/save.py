"""Writing the state of a run, so that a failed save leaves the earlier ones as they were."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from dsllm.checkpoint.layout import (
    complete_folders,
    mark_complete,
    random_state_file,
    step_folder,
    step_folders,
    step_of,
    unmark,
    write_latest,
)
from dsllm.engine.ranks import gather
from dsllm.errors import CheckpointError

logger = logging.getLogger(__name__)


def save_checkpoint(engine: DeepSpeedEngine, checkpoints: Path, step: int, keep_last: int) -> None:
    """Write weights, optimizer and random states after `step` steps; collective.

    `latest` moves only when every rank has finished. Raises CheckpointError, on every rank, where one could not
    write; what it had written is removed, and the earlier checkpoints and `latest` are untouched.
    """
    folder = step_folder(checkpoints, step)
    writer = ForgivingCheckpointEngine()
    _make_folder(folder, writer)
    _agree(writer, folder)
    with _deepspeed_writes_through(writer, engine):
        client_state = {"dsllm": {"step": step, "world_size": distributed.get_world_size()}}
        engine.save_checkpoint(str(checkpoints), tag=folder.name, client_state=client_state, save_latest=False)
    writer.save(random_states(), str(random_state_file(folder, distributed.get_rank())))
    _agree(writer, folder)
    if distributed.get_rank() == 0:
        mark_complete(folder, step, distributed.get_world_size())
        write_latest(checkpoints, folder)
        remove_old(checkpoints, folder, keep_last)
    distributed.barrier()
    logger.info("saved %s", folder)


def random_states() -> dict[str, torch.Tensor]:
    """State of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        states["accelerator"] = get_accelerator().get_rng_state()
    return states


class ForgivingCheckpointEngine(TorchCheckpointEngine):
    """Keeps the first fault instead of raising it.

    DeepSpeed's save has barriers between its files: a rank that raises on the way leaves the others waiting for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fault: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, unless one could not be written before."""
        if self.fault is not None:
            return
        try:
            # Through a Python file, which says why a write failed where torch's own writer does not.
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            self.fault = f"{path}: {_reason(error)}"


@contextlib.contextmanager
def _deepspeed_writes_through(writer: ForgivingCheckpointEngine, engine: DeepSpeedEngine) -> Iterator[None]:
    """DeepSpeed saves with `writer`, and without its recovery script, whose copy could raise on rank 0 alone."""
    usual_writer = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = usual_writer
        del engine._copy_recovery_script


def _make_folder(folder: Path, writer: ForgivingCheckpointEngine) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unmark(folder)
    except OSError as error:
        writer.fault = f"{folder}: {_reason(error)}"


def _agree(writer: ForgivingCheckpointEngine, folder: Path) -> None:
    """Raise on every rank if any of them has a fault."""
    faults = [(rank, fault) for rank, fault in enumerate(gather(writer.fault)) if fault]
    if not faults:
        return
    if distributed.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    rank, fault = faults[0]
    raise CheckpointError(
        f"{folder.name} was not saved: rank {rank} could not write {fault}; earlier checkpoints are untouched; make "
        "room or choose another --run-dir, then start again: the run goes on from the last one"
    )


def _reason(error: Exception) -> str:
    """The operating system's own word where there is one: torch closes a failed archive with an error of its own."""
    for cause in (error, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return str(error).splitlines()[0]


def remove_old(checkpoints: Path, newest: Path, keep_last: int) -> None:
    """Delete all but the `keep_last` newest up to `newest`, and what a killed save left unfinished.

    Later ones belong to a run that this one was turned back from; they stay until it comes to their steps.
    """
    complete = complete_folders(checkpoints)
    kept = [folder for folder in complete if step_of(folder) <= step_of(newest)][-keep_last:]
    for folder in step_folders(checkpoints):
        is_old = folder in complete and step_of(folder) <= step_of(newest)
        if folder not in kept and (is_old or folder not in complete):
            shutil.rmtree(folder, ignore_errors=True)
