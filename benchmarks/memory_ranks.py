"""Takes a few steps of each run on this rank and notes the memory of their phases. Started by estimate_accuracy.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dsllm.ds_config import build_ds_config
from dsllm.engine import ranks
from dsllm.engine.activity import Activity
from dsllm.engine.allocators import allocator
from dsllm.engine.memory_meter import MemoryMeter
from dsllm.engine.requests import Requests
from dsllm.engine.start import start_engine
from dsllm.engine.trainer import train_step
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec

STEPS = 2
"""The optimizer makes some of its states in the first."""
DOCUMENT_TOKENS = 50
"""Of each document, where they are masked; the mask takes as much whatever their length."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path, help="JSON list of {spec, overrides}")
    parser.add_argument("--output", type=Path, help="JSON list of each case's memory on each rank")
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()

    measured = ranks.gather(measure_each(json.loads(args.cases.read_text())))
    if torch.distributed.get_rank() == 0:
        args.output.write_text(json.dumps([list(on_ranks) for on_ranks in zip(*measured, strict=True)]))


def measure_each(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The peaks of each case on this rank; a case is the `spec` and its `overrides`. Collective."""
    world = ranks.join()
    return [measure(load_spec(case["spec"], case["overrides"]), world) for case in cases]


def measure(spec: Spec, world: ranks.World) -> dict[str, Any]:
    """The peaks of one run on this rank."""
    memory = MemoryMeter(allocator(ranks.device_type()))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if memory.measured is None:
        raise SystemExit("estimate_accuracy: memory on the CPU is counted by a library compiled here; install g++")
    micro_batch_size = spec.batch.micro_batch_size
    engine = start_engine(spec, build_ds_config(spec, world.size, ranks.device_type(), micro_batch_size))
    shape = (micro_batch_size, spec.batch.sequence_length)
    documents = {}
    if spec.data.mask_documents:
        documents = {"position_ids": torch.arange(shape[1]).remainder(DOCUMENT_TOKENS).repeat(micro_batch_size, 1)}

    def micro_batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            tokens = torch.randint(spec.vocab_size, shape)
            yield {"input_ids": tokens, "labels": tokens, **documents}

    batches, requests, activity = micro_batches(), Requests(), Activity()
    for _ in range(STEPS):
        train_step(engine, batches, requests, memory, activity)
    measured = asdict(memory.measured)
    engine.destroy()
    return measured


if __name__ == "__main__":
    main()
