"""Runs of one spec at several stages, in one start of DeepSpeed: what each read, and what it had after its resume."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.distributed.attempts import attempt


def train_each(runs: list[list[str]]) -> list[dict[str, Any]]:
    """Train each of `runs` in turn; of each its exit status, its words, and a digest of each micro-batch it read."""
    return [_train(arguments) for arguments in runs]


def resume_each(runs: list[list[str]], resaved: list[str]) -> list[dict[str, Any]]:
    """The same, and what each has in its engine right after the resume is saved again under the folder named for it."""
    from dsllm.checkpoint import resume

    usual, told = resume.load_checkpoint, []
    for arguments, folder in zip(runs, resaved, strict=True):

        def load_and_save(engine: Any, checkpoint: Path, folder: str = folder) -> int:
            step = usual(engine, checkpoint)
            _save(engine, Path(folder), step)
            return step

        resume.load_checkpoint = load_and_save
        try:
            told.append(_train(arguments))
        finally:
            resume.load_checkpoint = usual
    return told


def _save(engine: Any, folder: Path, step: int) -> None:
    from dsllm.checkpoint.save import CheckpointSaver
    from dsllm.spec.sections import Checkpoint

    with CheckpointSaver(engine, folder, Checkpoint(), "fp32") as saver:
        saver.save(step, must_succeed=True)


def _train(arguments: list[str]) -> dict[str, Any]:
    from dsllm.engine import inputs

    usual, seen = inputs.open_training, []

    def open_and_note(*arguments: Any) -> Callable[..., Iterator[Any]]:
        read = usual(*arguments)

        def read_and_note(*position: Any) -> Iterator[Any]:
            for batch in read(*position):
                seen.extend(hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in batch["input_ids"])
                yield batch

        return read_and_note

    inputs.open_training = open_and_note
    try:
        return {**attempt(arguments), "read": seen}
    finally:
        inputs.open_training = usual
