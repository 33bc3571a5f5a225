"""Going on: which checkpoint, whether it belongs to this run, and its state back on every rank."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as distributed
from deepspeed import DeepSpeedEngine

from dsllm.checkpoint.catalogue import newest_first
from dsllm.checkpoint.layout import (
    is_complete,
    random_state_file,
    read_latest,
    run_folder_of,
    step_folders,
)
from dsllm.checkpoint.manifest import ANOTHER, read_manifest
from dsllm.checkpoint.restore import restore_states
from dsllm.checkpoint.safe_load import weights_only
from dsllm.checkpoint.states import mapped
from dsllm.engine.generators import reseed, set_generator_states
from dsllm.engine.starting_point import FROM_SCRATCH
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
    "optimizer.name",
)
"""Fields that a run cannot change half-way: with another value it would be another run."""
FREE = ("batch.micro_batch_size", "model.attention", "model.init.name", "model.init.revision")
"""Exceptions within them: they change how the same numbers are computed; or, of a model that the run started from and
that is read no more, where it is."""


def candidates(resume: str, checkpoints: Path) -> list[Path]:
    """The checkpoints to go on from, best first; none for a fresh start.

    `resume` is `auto` (the latest, or the newest before it that is sound), `never` (a fresh start, refused where it
    would mix with an older run), or a path: a run, its `checkpoints`, or one checkpoint. Raises UserError, and
    CheckpointError where `latest` shows that there was a run and nothing of it is complete.
    """
    if resume == "auto":
        found = newest_first(checkpoints)
        latest = read_latest(checkpoints)
        if found and latest is None:
            logger.warning(
                "%s: there is no file named latest; going on from the newest, %s", checkpoints, found[0].name
            )
        elif latest is not None and not found:
            raise CheckpointError(
                f"{checkpoints}: latest names {latest.name}, and no checkpoint there is complete; bring one back, or "
                "start with another --run-dir"
            )
        elif latest is not None and latest not in found:
            logger.warning(
                "%s/latest names %s, which is not there or not complete; going back to %s",
                checkpoints,
                latest.name,
                found[0].name,
            )
        return found
    if resume == "never":
        if folders := step_folders(checkpoints):
            raise UserError(
                f"--resume never: {checkpoints} holds {folders[-1].name} of an earlier run; choose "
                "another --run-dir, or delete that folder"
            )
        return []
    return [checkpoint_at(Path(resume))]


def check_same_run(spec: Spec, checkpoint: Path) -> None:
    """Compare the spec with that of the run so far: differences are told, those that make another run refused."""
    path = run_folder_of(checkpoint) / "spec.yaml"
    if not path.is_file():
        return
    differences = spec_differences(load_spec(str(path)), spec)
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


def check_same_data(checkpoint: Path, passport: dict[str, Any]) -> None:
    """Raises UserError where tokens or tokenizer are not those that the run has trained on so far."""
    path = run_folder_of(checkpoint) / "passport.json"
    if not path.is_file():
        return
    earlier = json.loads(path.read_text())
    for name, what in (("tokenizer_hash", "tokenizer"), ("data_hash", "prepared tokens")):
        if earlier[name] != passport[name]:
            raise UserError(
                f"{checkpoint}: the {what} changed since (was {earlier[name][:12]}…, now {passport[name][:12]}…); bring"
                " the old data.directory back, or start a run with another --run-dir"
            )


def started_from(checkpoint: Path) -> dict[str, Any]:
    """What the passport of the checkpoint's run says of the weights that it started with."""
    path = run_folder_of(checkpoint) / "passport.json"
    passport: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return passport.get("init") or FROM_SCRATCH


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Path) -> int:
    """Put the state of `checkpoint` back on every rank, whatever stage and number of ranks wrote it; collective.

    Returns the steps it has done. Raises CheckpointError where it cannot be read.
    """
    step = read_manifest(checkpoint).step
    if engine.zero_nvme_offload_optimizer():
        _load_as_written(engine, checkpoint)
    else:
        restore_states(engine, checkpoint)
    engine.global_steps = step
    engine.global_samples = step * engine.train_batch_size()
    states = random_state_file(checkpoint, distributed.get_rank())
    if states.is_file():  # there are none for ranks that were not there, and none after a conversion
        set_generator_states(mapped(states))
    else:
        reseed(step)
    return step


def conversion(engine: DeepSpeedEngine, checkpoint: Path) -> str | None:
    """What has to be converted to load `checkpoint`, in words; None where it was written just so."""
    origin = read_manifest(checkpoint).origin
    now = f"ZeRO stage {engine.zero_optimization_stage()} on {distributed.get_world_size()} rank(s)"
    return None if origin == now else f"converting {checkpoint.name}, written by {origin}, to {now}"


def _load_as_written(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """States on NVMe are files of DeepSpeed's own, which it alone reads, and only as they were written."""
    if (other := conversion(engine, checkpoint)) is not None:
        raise UserError(
            f"{checkpoint}: {other} is not possible with zero.offload_optimizer nvme; resume with "
            "zero.offload_optimizer cpu or none"
        )
    try:
        with weights_only():
            path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    except Exception as error:
        raise CheckpointError(f"{checkpoint}: cannot be read: {error}; {ANOTHER}") from error
    if path is None:
        raise CheckpointError(f"{checkpoint}: DeepSpeed finds no state in it; {ANOTHER}")


def checkpoint_at(path: Path) -> Path:
    """The checkpoint of a run folder, of its `checkpoints`, or a checkpoint itself. Raises UserError without one."""
    if is_complete(path):
        return path
    for checkpoints in (path, path / "checkpoints"):
        if found := newest_first(checkpoints):
            return found[0]
    raise UserError(f"{path}: no checkpoint there; give a run, its checkpoints, or a global_step<N> folder")


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
