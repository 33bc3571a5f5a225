"""Where the host reads what the device has computed, and so waits for it: counted while real steps run."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.small_runs import GLOBAL_BATCH_SIZE, own_micro_batches, own_packed_micro_batches, small_spec

ATEN = torch.ops.aten
READING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.is_nonzero, ATEN.unique_dim}
"""Operators whose result, or its shape, the host needs to go on: `.item()`, `bool()`, masks as indices."""
STEPS, ACCUMULATION = 3, 2


class Reads(TorchDispatchMode):
    """Counts them by the part of the step that they are in."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.micro_step = "start", 0
        self.found: Counter[str] = Counter()
        self.places: dict[str, str] = {}

    def begin(self, part: str) -> None:
        """What the loop's Activity is told."""
        if part == "reading" and self.part == "step":
            self.micro_step += 1
        self.part = part

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in READING:
            last = self.micro_step % ACCUMULATION == ACCUMULATION - 1
            part = f"{self.part} of the last micro-step" if last else self.part
            self.found[part] += 1
            self.places[part] = _place()
        return function(*args, **(kwargs or {}))


def count_each(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case: reads by part of the step, over STEPS steps, and where the last of each part was."""
    return [_count(**case) for case in cases]


def _count(family: str, stage: int, overrides: list[str]) -> dict[str, Any]:
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import ranks
    from dsllm.engine.activity import Activity
    from dsllm.engine.memory_meter import MemoryMeter
    from dsllm.engine.requests import Requests
    from dsllm.engine.start import start_engine
    from dsllm.engine.trainer import train_step

    world = ranks.join()
    size = GLOBAL_BATCH_SIZE // (ACCUMULATION * world.size)
    spec = small_spec(family, stage, *overrides, f"batch.micro_batch_size={size}")
    engine = start_engine(spec, build_ds_config(spec, world.size, "cpu"))
    read = own_packed_micro_batches if spec.data.mask_documents else own_micro_batches
    micro_batches = read(STEPS + 1, world.rank, world.size, size)

    reads = Reads()

    class Watched(Activity):
        def __call__(self, what: str) -> None:
            reads.begin(what)

    train_step(engine, micro_batches, Requests(), MemoryMeter(None), Activity())  # states are made
    with reads:
        for _ in range(STEPS):
            train_step(engine, micro_batches, Requests(), MemoryMeter(None), Watched())
    engine.destroy()
    return {"found": dict(reads.found), "places": reads.places}


def _place() -> str:
    """The innermost calls that are neither torch's nor this file's."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return " < ".join(f"{f.filename.rsplit('/', 2)[-1]}:{f.lineno}" for f in reversed(frames[-3:]))


def forbid_each(cases: list[dict[str, Any]]) -> list[bool]:
    """On a GPU: micro-steps of each case in which torch raises at anything that waits for the device."""
    return [_forbid(**case) for case in cases]


def _forbid(family: str, overrides: list[str]) -> bool:
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import nonfinite, ranks
    from dsllm.engine.start import start_engine

    world = ranks.join()
    spec = small_spec(family, 2, *overrides, f"batch.micro_batch_size={GLOBAL_BATCH_SIZE // ACCUMULATION}")
    engine = start_engine(spec, build_ds_config(spec, world.size, "cuda"))
    for micro_step, batch in enumerate(own_micro_batches(STEPS, 0, 1, GLOBAL_BATCH_SIZE // ACCUMULATION)):
        on_device = {name: tensor.pin_memory().to(ranks.device(), non_blocking=True) for name, tensor in batch.items()}
        is_last = micro_step % ACCUMULATION == ACCUMULATION - 1
        is_settled = micro_step >= ACCUMULATION  # the first step allocates and chooses kernels
        torch.cuda.set_sync_debug_mode("error" if is_settled and not is_last else "default")
        engine.backward(nonfinite.poisoned(engine(**on_device)))
        engine.step()
    torch.cuda.set_sync_debug_mode("default")
    engine.destroy()
    return True
