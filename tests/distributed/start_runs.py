"""Engines that start from a model that transformers wrote, for test_starts.py."""

from __future__ import annotations

from typing import Any

from tests.distributed.small_runs import GLOBAL_BATCH_SIZE, own_micro_batches, small_spec, warm_up


def train_from_each(cases: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """On every rank, each case in turn."""
    return [train_from(steps=steps, **case) for case in cases]


def train_from(family: str, stage: int, overrides: list[str], steps: int) -> dict[str, Any]:
    """The losses of an engine whose weights are those of `model.init`, and the check of its weights."""
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import ranks
    from dsllm.engine.activity import Activity
    from dsllm.engine.gates.weights import check_weights
    from dsllm.engine.memory_meter import MemoryMeter
    from dsllm.engine.requests import Requests
    from dsllm.engine.start import start_engine
    from dsllm.engine.starting_point import open_starting_point
    from dsllm.engine.trainer import set_learning_rate, train_step

    world = ranks.join()
    size = GLOBAL_BATCH_SIZE // world.size
    spec = small_spec(family, stage, *overrides, f"batch.micro_batch_size={size}")
    start = open_starting_point(spec)
    engine = start_engine(spec, build_ds_config(spec, world.size, "cpu"), start)
    check = check_weights(engine.module.causal_lm, start)
    micro_batches, losses = own_micro_batches(steps, world.rank, world.size, size), []
    for step in range(steps):
        set_learning_rate(engine, warm_up(step))
        metrics, _ = train_step(engine, micro_batches, Requests(), MemoryMeter(None), Activity())
        losses.append(metrics["loss"])
    engine.destroy()
    return {"losses": losses, "check": check.document()}
