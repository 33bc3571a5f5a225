"""The engine's own steps on random tokens, on this rank: their seconds, their memory, and where time goes by kernel.

Started by throughput.py: `deepspeed throughput_ranks.py --spec NAME ...`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kernel_groups import grouped_seconds
from torch.profiler import ProfilerActivity, profile

from dsllm.ds_config import build_ds_config
from dsllm.engine import ranks
from dsllm.engine.activity import Activity
from dsllm.engine.allocators import allocator
from dsllm.engine.memory_meter import MemoryMeter
from dsllm.engine.requests import Requests
from dsllm.engine.start import kernels, loss_implementation, start_engine
from dsllm.engine.trainer import set_learning_rate, train_step
from dsllm.plan.memory import PHASES, estimate_memory
from dsllm.plan.workload import workload
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec

PROFILED_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--profile", action="store_true", help="time two steps more by kernel")
    parser.add_argument("--output", type=Path, help="JSON of rank 0")
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()

    world = ranks.join()
    spec = load_spec(args.spec, args.set)
    found = measure(spec, world, args.steps, args.profile)
    if world.rank == 0:
        args.output.write_text(json.dumps(found))


def measure(spec: Spec, world: ranks.World, steps: int, is_profiled: bool) -> dict[str, Any]:
    """Steps of the engine as a run takes them, on tokens that mean nothing."""
    device = ranks.device_type()
    memory = MemoryMeter(allocator(device))
    engine = start_engine(spec, build_ds_config(spec, world.size, device))
    micro_batches, requests, activity = _random_tokens(spec, pin=device == "cuda"), Requests(), Activity()
    set_learning_rate(engine, 1e-5)

    def take() -> float:
        return float(train_step(engine, micro_batches, requests, memory, activity)[0]["step_seconds"])

    found: dict[str, Any] = {"step_seconds": [take() for _ in range(steps)]}
    if is_profiled:
        found["kernel_seconds"] = _profiled(take, device)
    return {
        **found,
        "device_name": ranks.device_name(),
        "kernels": kernels(spec, engine.module.causal_lm.config.model_type),
        "loss": loss_implementation(spec),
        **_memory(spec, world, memory),
    }


def _memory(spec: Spec, world: ranks.World, memory: MemoryMeter) -> dict[str, int]:
    """Tensor bytes at the peak, measured and predicted; nothing where the device does not count them."""
    if memory.measured is None:
        return {}
    estimate = estimate_memory(
        workload(spec, loss_implementation(spec)), world.size, spec.batch.micro_batch_size, device=ranks.device_type()
    )
    predicted = max(estimate.tensor_bytes(phase) for phase in PHASES)
    return {"peak_bytes": max(asdict(memory.measured)["peak_bytes"].values()), "predicted_bytes": predicted}


def _profiled(take: Any, device: str) -> dict[str, float]:
    """Seconds of a step by group of kernels, on this rank."""
    activities = [ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            take()
    is_cuda = device == "cuda"
    microseconds = {
        event.key: event.self_device_time_total if is_cuda else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    return grouped_seconds({name: each / 1e6 / PROFILED_STEPS for name, each in microseconds.items()})


def _random_tokens(spec: Spec, pin: bool) -> Iterator[dict[str, torch.Tensor]]:
    shape = (spec.batch.micro_batch_size, spec.batch.sequence_length)
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(spec.vocab_size, shape, generator=generator)
        tokens = tokens.pin_memory() if pin else tokens
        yield {"input_ids": tokens, "labels": tokens}


if __name__ == "__main__":
    main()
