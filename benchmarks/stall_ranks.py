"""Times both ways of saving one engine's state on this rank, in turns. Started by checkpoint_stall.py."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from dsllm.checkpoint.save import CheckpointSaver
from dsllm.ds_config import build_ds_config
from dsllm.engine import ranks
from dsllm.engine.activity import Activity
from dsllm.engine.memory_meter import MemoryMeter
from dsllm.engine.requests import Requests
from dsllm.engine.start import start_engine
from dsllm.engine.trainer import train_step
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, help="JSON list of {spec, overrides}")
    parser.add_argument("--output", type=Path, help="JSON list of what each case took")
    parser.add_argument("--folder", type=Path, help="where checkpoints go for a moment")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()

    world = ranks.join()
    cases = json.loads(args.cases.read_text())
    rows = [measure(load_spec(case["spec"], case["overrides"]), world, args.folder, args.rounds) for case in cases]
    if distributed.get_rank() == 0:
        args.output.write_text(json.dumps(rows))


def measure(spec: Spec, world: ranks.World, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds that training waits, the longest of all ranks, in the median over the rounds; and bytes on disk."""
    engine = start_engine(spec, build_ds_config(spec, world.size, ranks.device_type(), spec.batch.micro_batch_size))
    with CheckpointSaver(engine, folder / "ours", spec.checkpoint, spec.training.precision) as saver:
        step = training(engine, spec)
        quiet = [timed(step) for _ in range(3)][1:]
        first_seconds, *_ = save_beside_training(saver, step, 0)
        own, beside, synchronous = [], [], []
        for number in range(1, rounds + 1):
            synchronous.append(timed(lambda: engine.save_checkpoint(str(folder / "deepspeed"), tag="state")))
            deepspeed_bytes = clear(folder / "deepspeed")
            quiet.append(timed(step))
            waited, steps = save_beside_training(saver, step, number)
            own.append(waited)
            beside.extend(steps)
            own_bytes = clear(folder / "ours")
    engine.destroy()
    return {
        "stage": spec.zero.stage,
        "precision": spec.training.precision,
        "deepspeed_seconds": statistics.median(synchronous),
        "waited_seconds": statistics.median(own),
        "first_waited_seconds": first_seconds,
        "step_seconds": statistics.median(quiet),
        "step_while_writing_seconds": statistics.median(beside),
        "deepspeed_bytes": deepspeed_bytes,
        "bytes": own_bytes,
    }


def save_beside_training(saver: CheckpointSaver, step: Callable[..., Any], number: int) -> tuple[float, list[float]]:
    """One checkpoint as the training loop makes it: seconds that it waits, and those of the steps meanwhile."""
    waits, steps = [timed(lambda: saver.save(number))], []

    def settle() -> None:
        started = time.perf_counter()
        saver.settle()
        waits.append(time.perf_counter() - started)

    while saver.is_pending:
        steps.append(timed(lambda: step(settle)))
        waits.append(timed(saver.poll))
    return sum(waits), steps


def training(engine: Any, spec: Spec) -> Callable[..., Any]:
    """One optimizer step on random tokens, told what to do before its update."""
    shape = (spec.batch.micro_batch_size, spec.batch.sequence_length)

    def micro_batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            tokens = torch.randint(spec.vocab_size, shape)
            yield {"input_ids": tokens, "labels": tokens}

    batches, requests, memory, activity = micro_batches(), Requests(), MemoryMeter(None), Activity()
    return lambda before_update=lambda: None: train_step(engine, batches, requests, memory, activity, before_update)


def timed(work: Callable[[], Any]) -> float:
    """Seconds on the slowest rank, from a moment at which all begin."""
    distributed.barrier()
    started = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - started, device=ranks.device())
    distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
    return float(seconds)


def clear(folder: Path) -> int:
    """Bytes of the files in it, which are deleted."""
    distributed.barrier()
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    distributed.barrier()
    if distributed.get_rank() == 0:
        shutil.rmtree(folder)
    distributed.barrier()
    return size_bytes


if __name__ == "__main__":
    main()
