"""Memory that ran out on a rank: what was predicted to be there, and the smallest change that takes less."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from dsllm.engine.memory_meter import MemoryMeter
from dsllm.engine.ranks import World
from dsllm.errors import OneRankError
from dsllm.plan.advice import Advice, advise
from dsllm.plan.hardware import Gpu
from dsllm.plan.memory import MemoryEstimate, Terms
from dsllm.plan.way import Way
from dsllm.units import format_bytes

NAMED_TERMS = 3
"""Of the prediction, the largest; the rest seldom decides."""
WORDS = ("can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc")
"""Of torch's allocators on the CPU and on CUDA, of the kernel, of C++."""


@dataclass(frozen=True)
class Needs:
    """A run as it is, and what it and any change of it is predicted to need."""

    way: Way
    predict: Callable[[Way], MemoryEstimate]
    world: World


@contextlib.contextmanager
def explained(needs: Needs, memory: MemoryMeter, otherwise: str) -> Iterator[None]:
    """Within, exhausted memory is a OneRankError that says in which phase, `otherwise` outside of any, and what to
    change. Any other error is itself."""
    try:
        yield
    except Exception as error:
        if not is_exhaustion(error):
            raise
        raise OneRankError(explanation(needs, memory, otherwise, str(error)), cause="out_of_memory") from error


def is_exhaustion(error: Exception) -> bool:
    """Whether an allocator, of the device or of the host, had no more to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in WORDS)


def explanation(needs: Needs, memory: MemoryMeter, otherwise: str, reason: str) -> str:
    """Phase, largest terms of its prediction, remedy, and the allocator's own words, in one line."""
    predicted = needs.predict(needs.way)
    terms = predicted.phases[memory.during] if memory.during else predicted.kept
    where = f"in {memory.during}" if memory.during else otherwise
    held = memory.held_bytes
    at = f", at {format_bytes(held)} of tensors" if held else ""
    return (
        f"rank {needs.world.rank}: out of memory {where}{at}; predicted for it are {_largest(terms)}, "
        f"{format_bytes(terms.total_bytes)} in all; {_remedy(needs, predicted, held)} ({_own_words(reason)})"
    )


def _largest(terms: Terms) -> str:
    named = {name: value for name, value in asdict(terms).items() if value}
    largest = sorted(named, key=lambda name: named[name], reverse=True)[:NAMED_TERMS]
    return ", ".join(f"{name.removesuffix('_bytes')} {format_bytes(named[name])}" for name in largest)


def _remedy(needs: Needs, predicted: MemoryEstimate, held_bytes: int) -> str:
    """The smallest change that is predicted to take less than the tensors that did fit, and than now."""
    now_bytes = predicted.tensor_bytes(predicted.peak_phase)
    advice = advise(needs.way, _this_device(needs, min(held_bytes or now_bytes, now_bytes), predicted), needs.predict)
    takes = format_bytes(advice.estimate.peak.total_bytes)
    if advice.fits:
        return f"to fit, {_typed(advice)} takes {takes}"
    return f"nothing on these ranks takes less than that; the least is {_typed(advice)} with {takes}"


def _this_device(needs: Needs, tensor_bytes: int, predicted: MemoryEstimate) -> Gpu:
    """What is here: room for so many bytes of tensors beside the runtime, in a host of this size."""
    return Gpu(
        name="this device",
        memory_bytes=tensor_bytes + predicted.peak.runtime_bytes,
        flops=dict.fromkeys(("bf16", "fp16", "fp32"), 1.0),  # the run computes in its precision already
        memory_bytes_per_second=1.0,
        gpus_per_node=needs.world.local_size,
        host_memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def _typed(advice: Advice) -> str:
    """The options that say it."""
    words = [f"--set {name}={value}" for name, value in advice.settings.items()]
    if advice.world_size is not None:
        words.append(f"{advice.world_size} ranks")
    return " ".join(words) or "the run as it is"


def _own_words(reason: str) -> str:
    """Of an allocator's message, its first sentence, without the place in torch's source that it may begin with."""
    line = (reason.strip() or "no more memory").splitlines()[0]
    return line.split("DefaultCPUAllocator: ")[-1].split(". ")[0].rstrip(".")
