"""A checkpoint in DeepSpeed's universal layout: a folder for each parameter, for any stage and number of ranks.

dsllm itself resumes anywhere without it; it is for keeping, and for other programs that load `"load_universal": true`.
DeepSpeed's converter ds_to_universal makes one layout from stages 1 and 2 and another from stage 3, each of which loads
only where it came from (0.19.8); this one loads at stages 1 to 3.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch

from dsllm.checkpoint.layout import run_folder_of, sync_folder, universal_folder
from dsllm.checkpoint.manifest import FileRecord, Manifest, read_manifest, write_manifest
from dsllm.checkpoint.snapshot import write_files
from dsllm.checkpoint.states import (
    MASTER,
    MUON_MOMENTS,
    OPTIMIZER_STATE_FILE,
    UNIVERSAL_STATES,
    SavedStates,
    open_states,
)
from dsllm.checkpoint.verify import faults_of
from dsllm.errors import CheckpointError
from dsllm.model.output_folder import refuse_filled
from dsllm.units import format_bytes

FP32_BYTES = 4
OF_THE_RUN = ("spec.yaml", "passport.json", "history.jsonl", "tokenizer")
"""What a checkpoint needs of its run where it is kept elsewhere."""


def convert(
    checkpoint: Path, output: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> tuple[Path, Manifest]:
    """Convert a complete checkpoint to `output`, or beside itself to `global_step<N>_universal`.

    Weights and moments keep their bits. Parameters are read and written one at a time; `progress` hears how many of how
    many are done. What is at the place of the result is never half of it: killed at any moment, nothing is there.
    Raises UserError where `output` holds something, CheckpointError for a damaged checkpoint or a disk without room.
    """
    target = output or universal_folder(checkpoint)
    refuse_filled(target, "the converted checkpoint")
    if faults := faults_of(checkpoint):
        raise CheckpointError(f"{checkpoint}: {faults[0]}; convert another checkpoint")
    states, manifest = open_states(checkpoint), read_manifest(checkpoint)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(target.parent, states)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        converted = _write(partial, checkpoint, states, manifest, progress)
        if target.exists():
            target.rmdir()
        partial.rename(target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target, converted


def _write(
    folder: Path, checkpoint: Path, states: SavedStates, manifest: Manifest, progress: Callable[[int, int], None] | None
) -> Manifest:
    (folder / UNIVERSAL_STATES).mkdir(parents=True)
    if run_folder_of(checkpoint) == checkpoint or folder.parent != checkpoint.parent:
        _bring_along(run_folder_of(checkpoint), folder)
    records: dict[Path, FileRecord] = {}
    for done, name in enumerate(states.shapes, 1):
        records |= _write_parameter(folder / UNIVERSAL_STATES / name, name, states)
        if progress is not None:
            progress(done, len(states.shapes))
    records |= write_files(_common_files(folder, states, manifest))
    files = {path.relative_to(folder).as_posix(): record for path, record in records.items()}
    converted = manifest.model_copy(update={"zero_stage": None, "world_size": None, "files": files})
    write_manifest(folder, converted)
    return converted


def _write_parameter(folder: Path, name: str, states: SavedStates) -> dict[Path, FileRecord]:
    folder.mkdir()
    files: dict[Path, Any] = {}
    for kind in (MASTER, *states.moments(name)):
        whole = torch.empty(states.shapes[name], dtype=torch.float32)
        states.copy(kind, name, 0, whole.view(-1))
        files[folder / f"{kind}.pt"] = {"param": whole}
    files[folder / "step.pt"] = torch.tensor(float(states.adam_step))
    return write_files(files)


def _common_files(folder: Path, states: SavedStates, manifest: Manifest) -> dict[Path, Any]:
    """What DeepSpeed's loaders of stages 1 and 2, and of stage 3, expect beside the parameters.

    The parameter groups say nothing, so that an engine keeps the settings of its own: DeepSpeed would give all groups
    of stage 3 those of the first.
    """
    is_muon = any(states.moments(name) == MUON_MOMENTS for name in states.shapes)
    groups = [{"params": []}] * (3 if is_muon else 2)  # Muon's, matrices, vectors: engine/optimizer.py
    optimizer = {
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(float(states.adam_step))}}, "param_groups": groups},
        "ds_version": deepspeed.__version__,
        "dsllm": {"adam_step": states.adam_step, "loss_scaler": dict(states.loss_scaler)},
    }
    model = {
        "module": {},
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": manifest.step,
        "skipped_steps": 0,
        "dsllm": {"step": manifest.step},
    }
    return {
        folder / UNIVERSAL_STATES / OPTIMIZER_STATE_FILE: optimizer,
        folder / "mp_rank_00_model_states.pt": model,
        folder / "zero_pp_rank_0_mp_rank_00_model_states.pt": model,
    }


def _bring_along(run: Path, folder: Path) -> None:
    for name in OF_THE_RUN:
        source = run / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.is_file():
            shutil.copy(source, folder / name)


def _check_room(folder: Path, states: SavedStates) -> None:
    size_bytes = sum(
        FP32_BYTES * (1 + len(states.moments(name))) * torch.Size(shape).numel()
        for name, shape in states.shapes.items()
    )
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise CheckpointError(
            f"{folder}: the converted checkpoint takes {format_bytes(size_bytes)}, and there are "
            f"{format_bytes(free_bytes)} free; make room, or name another folder"
        )
