"""Runs with Muon that are saved, and go on at other stages: on every rank, in one start of DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.small_runs import GLOBAL_BATCH_SIZE, own_micro_batches, small_spec, warm_up

SAVED, STEPS = 3, 6


def run_each(cases: list[dict[str, Any]]) -> list[list[float]]:
    """The losses of each case in turn. One with a `folder` begins, and saves its state there after step SAVED; one with
    a `checkpoint` goes on from it."""
    return [_train(**case) for case in cases]


def _train(stage: int, overrides: list[str], folder: str | None = None, checkpoint: str | None = None) -> list[float]:
    from dsllm.checkpoint.resume import load_checkpoint
    from dsllm.checkpoint.save import CheckpointSaver
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import ranks
    from dsllm.engine.activity import Activity
    from dsllm.engine.memory_meter import MemoryMeter
    from dsllm.engine.requests import Requests
    from dsllm.engine.start import start_engine
    from dsllm.engine.trainer import set_learning_rate, train_step

    world = ranks.join()
    size = GLOBAL_BATCH_SIZE // (2 * world.size)
    spec = small_spec("gpt2", stage, *overrides, f"batch.micro_batch_size={size}")
    engine = start_engine(spec, build_ds_config(spec, world.size, "cpu"))
    if checkpoint is not None:
        assert load_checkpoint(engine, Path(checkpoint)) == SAVED
    micro_batches = own_micro_batches(STEPS, world.rank, world.size, size)
    first_step = 0 if checkpoint is None else SAVED
    for _ in range(first_step * engine.gradient_accumulation_steps()):
        next(micro_batches)
    losses = []
    for step in range(first_step, STEPS):
        set_learning_rate(engine, warm_up(step))
        losses.append(train_step(engine, micro_batches, Requests(), MemoryMeter(None), Activity())[0]["loss"])
        if folder is not None and step + 1 == SAVED:
            with CheckpointSaver(engine, Path(folder), spec.checkpoint, spec.training.precision) as saver:
                saver.save(SAVED, must_succeed=True)
    engine.destroy()
    return losses
