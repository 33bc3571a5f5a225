"""Universal checkpoints loaded by DeepSpeed itself, on every rank."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

from tests.distributed.small_runs import GLOBAL_BATCH_SIZE, own_micro_batches, small_spec, warm_up

STEPS = 3


def train_and_save(cases: list[dict[str, Any]]) -> list[bool]:
    """Train each case for STEPS steps and save it into its folder; True where nothing went wrong."""
    return [_train_and_save(**case) for case in cases]


def load_with_deepspeed(cases: list[dict[str, Any]]) -> list[bool]:
    """Load the universal checkpoint of each case with DeepSpeed's own code, and save what the engine then holds."""
    return [_load_with_deepspeed(**case) for case in cases]


def convert_with_deepspeed(checkpoint: str, output: str) -> None:
    """DeepSpeed's own conversion."""
    from deepspeed.checkpoint.ds_to_universal import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(
            argparse.Namespace(
                input_folder=checkpoint,
                output_folder=output,
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )


def _engine(stage: int, overrides: list[str], universal: bool = False) -> Any:
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import ranks
    from dsllm.engine.start import start_engine

    world = ranks.join()
    spec = small_spec("gpt2", stage, *overrides, f"batch.micro_batch_size={GLOBAL_BATCH_SIZE // world.size}")
    config = build_ds_config(spec, world.size, "cpu")
    config["checkpoint"]["load_universal"] = universal
    return start_engine(spec, config), spec, world


def _save(engine: Any, spec: Any, folder: str, step: int) -> None:
    from dsllm.checkpoint.save import CheckpointSaver

    with CheckpointSaver(engine, Path(folder), spec.checkpoint, spec.training.precision) as saver:
        saver.save(step, must_succeed=True)
    engine.destroy()


def _train_and_save(stage: int, overrides: list[str], folder: str) -> bool:
    from dsllm.engine.activity import Activity
    from dsllm.engine.memory_meter import MemoryMeter
    from dsllm.engine.requests import Requests
    from dsllm.engine.trainer import set_learning_rate, train_step

    engine, spec, world = _engine(stage, overrides)
    micro_batches = own_micro_batches(STEPS, world.rank, world.size, GLOBAL_BATCH_SIZE // world.size)
    for step in range(STEPS):
        set_learning_rate(engine, warm_up(step))
        train_step(engine, micro_batches, Requests(), MemoryMeter(None), Activity())
    _save(engine, spec, folder, STEPS)
    return True


def _load_with_deepspeed(stage: int, overrides: list[str], universal: str, folder: str) -> bool:
    engine, spec, _ = _engine(stage, overrides, universal=True)
    path, client_state = engine.load_checkpoint(str(Path(universal).parent), tag=Path(universal).name)
    assert path is not None
    assert client_state["dsllm"]["step"] == STEPS
    _save(engine, spec, folder, STEPS)
    return True
