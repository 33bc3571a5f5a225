"""Going on: which checkpoint, whether it belongs to this run, and its state back on every rank."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator

from dsllm.checkpoint.layout import complete_folders, random_state_file, read_latest, world_size_of
from dsllm.checkpoint.safe_load import weights_only
from dsllm.errors import CheckpointError, UserError
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec

logger = logging.getLogger(__name__)

SAME_RUN = (
    "seed",
    "model",
    "tokenizer",
    "data.sources",
    "data.validation_sources",
    "data.validation_fraction",
    "data.drop_duplicates",
    "data.min_document_characters",
    "data.packing",
    "data.mask_documents",
    "batch",
    "training.precision",
)
"""Fields that a run cannot change half-way: with another value it would be another run."""
AS_WRITTEN = (
    "zero.stage",
    "zero.offload_optimizer",
    "zero.offload_param",
    "training.gradient_accumulation_precision",
    "optimizer.betas",
    "optimizer.epsilon",
    "optimizer.weight_decay",
    "optimizer.gradient_clipping",
)
"""Fields that DeepSpeed's files fix: how states lie in them, and what it restores from them whatever the spec says."""
FREE = ("batch.micro_batch_size", "model.attention")
"""Exceptions within them: they change how the same numbers are computed."""


def choose_checkpoint(resume: str, checkpoints: Path) -> Path | None:
    """The `global_step<N>` folder to go on from, None for a fresh start.

    `resume` is `auto` (the latest, if there is one), `never` (a fresh start, refused where it would mix with an older
    run), or a path: a run, its `checkpoints`, or one step folder. Raises UserError.
    """
    if resume == "auto":
        return read_latest(checkpoints)
    if resume == "never":
        if complete := complete_folders(checkpoints):
            raise UserError(
                f"--resume never: {checkpoints} holds {complete[-1].name} of an earlier run; choose "
                "another --run-dir, or delete that folder"
            )
        return None
    return checkpoint_at(Path(resume))


def check_same_run(spec: Spec, checkpoint: Path) -> None:
    """Compare the spec with that of the run so far: differences are told, those that make another run refused."""
    path = checkpoint.parent.parent / "spec.yaml"
    if not path.is_file():
        return
    differences = spec_differences(load_spec(str(path)), spec)
    fixed = [line for field, line in differences if _is_under(field, AS_WRITTEN)]
    if fixed:
        raise UserError(
            f"{checkpoint}: written with another {'; '.join(fixed)}: DeepSpeed restores its states as they were "
            "written; set it back"
        )
    refused = [line for field, line in differences if _is_under(field, SAME_RUN) and not _is_under(field, FREE)]
    if refused:
        raise UserError(
            f"{checkpoint}: the spec now differs in {'; '.join(refused)}: that makes it another run; set it back, or "
            "start one with another --run-dir"
        )
    for _, line in differences:
        logger.info("changed since the checkpoint: %s", line)


def spec_differences(earlier: Spec, now: Spec) -> list[tuple[str, str]]:
    """Fields that differ, each with a line such as `seed (was 1337, now 7)`."""
    before, after = _flat(earlier.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    fields = sorted(before.keys() | after.keys())
    return [
        (field, f"{field} (was {before.get(field)}, now {after.get(field)})")
        for field in fields
        if before.get(field) != after.get(field)
    ]


def check_world_size(folder: Path, world_size: int) -> None:
    """Raises UserError where a checkpoint was written by another number of ranks: DeepSpeed cannot read it then."""
    written = world_size_of(folder)
    if written != world_size:
        raise UserError(f"{folder}: written by {written} rank(s), given {world_size}; start the run with {written}")


def check_same_data(checkpoint: Path, passport: dict[str, Any]) -> None:
    """Raises UserError where tokens or tokenizer are not those that the run has trained on so far."""
    path = checkpoint.parent.parent / "passport.json"
    if not path.is_file():
        return
    earlier = json.loads(path.read_text())
    for name, what in (("tokenizer_hash", "tokenizer"), ("data_hash", "prepared tokens")):
        if earlier[name] != passport[name]:
            raise UserError(
                f"{checkpoint}: the {what} changed since (was {earlier[name][:12]}…, now {passport[name][:12]}…); bring"
                " the old data.directory back, or start a run with another --run-dir"
            )


def load_checkpoint(engine: DeepSpeedEngine, folder: Path) -> int:
    """Put the state in `folder` back on every rank; collective. Returns the steps it has done.

    Raises CheckpointError where it cannot be read.
    """
    rank = distributed.get_rank()
    try:
        with weights_only():
            path, client_state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
            states = torch.load(random_state_file(folder, rank))
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}; resume from another with --resume PATH") from error
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed finds no state in it; resume from another with --resume PATH")
    _set_random_states(states)
    return int(client_state["dsllm"]["step"])


def checkpoint_at(path: Path) -> Path:
    """The checkpoint of a run folder, of its `checkpoints`, or a step folder itself. Raises UserError without one."""
    if path in complete_folders(path.parent):
        return path
    for checkpoints in (path, path / "checkpoints"):
        if checkpoints.is_dir() and (folder := read_latest(checkpoints)) is not None:
            return folder
    raise UserError(f"{path}: no checkpoint there; give a run, its checkpoints, or a global_step<N> folder")


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "accelerator" in states:
        get_accelerator().set_rng_state(states["accelerator"])


def _is_under(field: str, prefixes: tuple[str, ...]) -> bool:
    return any(field == prefix or field.startswith(prefix + ".") for prefix in prefixes)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists by index."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    return {key: leaf for name, child in items for key, leaf in _flat(child, f"{path}.{name}".lstrip(".")).items()}
