"""What the ranks of a run say to each other, and what they share on one host."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import deepspeed
import torch
import torch.distributed as distributed
from deepspeed.accelerator import get_accelerator

from dsllm.engine.last_words import cause_of
from dsllm.errors import Cause, DsllmError, UserError
from dsllm.launch.devices import num_cores
from dsllm.launch.placement import take_place

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The place of this process among all that train."""

    rank: int
    size: int
    local_size: int
    """Ranks on this host."""


def join(patience_seconds: float = 1800.0) -> World:
    """Meet the other ranks, and share the cores with those on this host. A process started alone is a world of one.

    `patience_seconds` is how long a collective may wait for a rank before it fails.
    """
    place = take_place(os.environ)
    if device_type() == "cuda":
        # DeepSpeed chooses the device only with the engine, and the first words between ranks come before that.
        get_accelerator().set_device(place.local_rank)
    else:
        # Serves DeepSpeed's inference only, and is compiled at the first start: no compiler is needed without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(backend, timeout=timedelta(seconds=patience_seconds))
    size = distributed.get_world_size()
    local_size = place.local_size or size
    if device_type() == "cpu":
        torch.set_num_threads(max(1, num_cores() // local_size))
        atexit.register(_leave)
    return World(distributed.get_rank(), size, local_size)


def _leave() -> None:
    """End gloo's threads while the interpreter still stands: one that outlives it aborts a run that has ended well.

    Not for NCCL, which a rank that fails alone would wait for.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()


def device_type() -> Literal["cuda", "cpu"]:
    """What this rank computes on."""
    return "cpu" if get_accelerator().device_name() == "cpu" else "cuda"


def device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    return torch.device(get_accelerator().current_device_name())


def has_bf16() -> bool:
    """Whether the accelerator itself computes in bf16: torch and DeepSpeed also count a GPU that emulates it slowly, as
    a V100 does."""
    if device_type() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(get_accelerator().is_bf16_supported())


def device_name() -> str:
    """What CUDA calls the accelerator, as `NVIDIA A100-SXM4-40GB`; `cpu`."""
    return torch.cuda.get_device_name() if device_type() == "cuda" else "cpu"


def memory_bytes(world: World) -> int:
    """Memory that every rank has: that of the smallest accelerator, or an equal share of the smallest host."""
    if device_type() == "cuda":
        total = get_accelerator().total_memory()
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size
    smallest = torch.tensor(total, dtype=torch.int64, device=device())
    distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
    return int(smallest)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise mean, on every rank. `values` is a small tensor on this rank's device."""
    return sum_over_ranks(values) / distributed.get_world_size()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum, on every rank."""
    distributed.all_reduce(values)
    return values


def of_rank_0(values: torch.Tensor) -> torch.Tensor:
    """What rank 0 gives, on every rank; all give a tensor of the same shape on their own device."""
    distributed.broadcast(values, 0)
    return values


def any_rank(is_so: bool) -> bool:
    """Whether it is so on any rank, on every rank."""
    return bool(sum_over_ranks(torch.tensor(float(is_so), device=device())) > 0)


def gather(value: T) -> list[T]:
    """One small object from every rank, in the order of ranks, on every rank."""
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def on_rank_0(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank. Where it raises, every rank raises, so that none waits for it."""
    outcome: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            outcome = [(work(), None)]
        except Exception as error:
            outcome = [(None, _told(error))]
            distributed.broadcast_object_list(outcome)
            raise
    distributed.broadcast_object_list(outcome)
    value, fault = outcome[0]
    if fault is not None:
        raise _from_another_rank(*fault)
    return cast(T, value)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Within, a fault may meet one rank alone; at the end all ranks learn of it, and all raise."""
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    faults = gather(fault and _told(fault))
    if fault is not None:
        raise fault
    for rank, other in enumerate(faults):
        if other is not None:
            message, exit_code, cause = other
            raise _from_another_rank(f"rank {rank}: {message}", exit_code, cause)


def _told(error: Exception) -> tuple[str, int, Cause]:
    """What the other ranks have to know of it."""
    return str(error), getattr(error, "exit_code", 1), cause_of(error)


def _from_another_rank(message: str, exit_code: int, cause: Cause) -> DsllmError:
    kind = UserError if exit_code == UserError.exit_code else DsllmError
    return kind(message, cause=cause, is_own=False)
