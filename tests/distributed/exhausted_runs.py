"""Runs of dsllm/train.py on one rank whose address space is limited on the way, for test_out_of_memory.py."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from tests.distributed.attempts import attempt

ROOM_BYTES = 24 * 2**20
"""What is left beyond what the process has when the limit comes: less than the model or a micro-batch needs."""
NO_LIMIT = resource.RLIM_INFINITY


def tell(large_model: list[str], large_batch: list[str]) -> dict[str, Any]:
    """How each run ended: one that runs out while its engine starts, one in its first forward."""
    from dsllm.engine import start

    usual_start = start.start_engine

    def start_with_little_room(*given: Any) -> Any:
        limit()
        return usual_start(*given)

    def little_room_for_forward(*given: Any) -> Any:
        engine = usual_start(*given)
        engine.module.register_forward_pre_hook(lambda module, inputs: limit())
        return engine

    told = {}
    runs = {"start": (start_with_little_room, large_model), "forward": (little_room_for_forward, large_batch)}
    for name, (starts, arguments) in runs.items():
        start.start_engine = starts
        told[name] = attempt(arguments)
        resource.setrlimit(resource.RLIMIT_AS, (NO_LIMIT, NO_LIMIT))
    start.start_engine = usual_start
    return told


def limit() -> None:
    """Let this process have no more than a little beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES, NO_LIMIT))
