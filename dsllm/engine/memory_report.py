"""What a run was predicted to take, what it took, and where the two differ."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from deepspeed import DeepSpeedEngine

from dsllm.engine import ranks
from dsllm.engine.memory_meter import MeasuredMemory
from dsllm.engine.run_folder import write_whole
from dsllm.plan.memory import PHASES, MemoryEstimate
from dsllm.units import MIB, format_bytes

logger = logging.getLogger(__name__)

COMPARED_BYTES = MIB
"""Below that, a difference in percent says nothing."""


@dataclass(frozen=True)
class RankMemory:
    """What one rank measured, in bytes."""

    measured: MeasuredMemory
    parameters_bytes: int
    optimizer_bytes: int
    runtime_bytes: int | None
    """Of the card, what its driver says is used beyond torch's allocator; None on the CPU."""


def conclude(
    path: Path, predicted: MemoryEstimate, engine: DeepSpeedEngine, measured: MeasuredMemory | None, steps: int
) -> None:
    """Compare over all ranks; rank 0 writes the report and says it. Collective.

    Nothing is said where a rank could not measure. The first step makes states that are kept from then on: in a run of
    one step, what stays and what a phase adds to it cannot be told apart, and only peaks and states are compared.
    """
    of_ranks = [memory for memory in ranks.gather(measured and memory_of_rank(engine, measured)) if memory is not None]
    if len(of_ranks) == distributed.get_world_size() and distributed.get_rank() == 0:
        report = memory_report(predicted, of_ranks, ranks.device_name(), is_settled=steps > 1)
        write_whole(path, json.dumps(report, indent=2) + "\n")
        for line in report_lines(report):
            logger.info("%s", line)


def memory_of_rank(engine: DeepSpeedEngine, measured: MeasuredMemory) -> RankMemory:
    """Adds to what the meter noted the bytes of weights and of optimizer states on this rank's device."""
    weights = _storages(_weights(engine))
    states = {address: size for address, size in _storages(_states(engine)).items() if address not in weights}
    return RankMemory(measured, sum(weights.values()), sum(states.values()), _runtime_bytes())


def memory_report(
    estimate: MemoryEstimate, of_ranks: list[RankMemory], device_name: str, *, is_settled: bool
) -> dict[str, Any]:
    """The run's `memory.json`: of every number the largest of all ranks', in bytes.

    With `is_settled`, what stays from step to step and what each phase adds to it are terms too.
    """
    peaks = {phase: max(rank.measured.peak_bytes[phase] for rank in of_ranks) for phase in PHASES}
    kept = max(rank.measured.kept_bytes for rank in of_ranks) if is_settled else None
    return {
        "device": device_name,
        "predicted": {
            "phases": {phase: asdict(terms) for phase, terms in estimate.phases.items()},
            "terms": _terms(
                estimate.peak.parameters_bytes,
                estimate.peak.optimizer_bytes,
                estimate.kept.total_bytes - estimate.kept.runtime_bytes if is_settled else None,
                {phase: estimate.tensor_bytes(phase) for phase in PHASES},
            ),
        },
        "measured": {
            "peak_bytes": peaks,
            "reserved_bytes": _largest(rank.measured.reserved_bytes for rank in of_ranks),
            "runtime_bytes": _largest(rank.runtime_bytes for rank in of_ranks),
            "terms": _terms(
                max(rank.parameters_bytes for rank in of_ranks),
                max(rank.optimizer_bytes for rank in of_ranks),
                kept,
                peaks,
            ),
        },
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """What is said of it at the end of a run: the peak, and each term predicted, measured and compared."""
    predicted, measured = report["predicted"]["terms"], report["measured"]["terms"]
    lines = [f"memory  {_compared(predicted['peak_bytes'], measured['peak_bytes'])}"]
    for name, value in measured.items():
        if name != "peak_bytes":
            lines.append(f"  {name.removesuffix('_bytes').replace('_', ' ')}  {_compared(predicted[name], value)}")
    return lines


def _terms(parameters: int, optimizer: int, kept: int | None, peaks: dict[Any, int]) -> dict[str, int]:
    """What stays from step to step, and what each phase adds to it at most, where that is known."""
    terms = {"peak_bytes": max(peaks.values()), "parameters_bytes": parameters, "optimizer_bytes": optimizer}
    if kept is None:
        return terms
    return {
        **terms,
        "gradients_and_buckets_kept_bytes": max(0, kept - parameters - optimizer),
        **{f"{phase}_adds_bytes": max(0, peaks[phase] - kept) for phase in PHASES},
    }


def _compared(predicted: int, measured: int) -> str:
    difference = f" ({predicted / measured - 1:+.1%})" if measured > COMPARED_BYTES else ""
    return f"predicted {format_bytes(predicted)}, measured {format_bytes(measured)}{difference}"


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _weights(engine: DeepSpeedEngine) -> Iterable[torch.Tensor]:
    """Parameters; at stage 3 the parts of them that this rank keeps, not what is gathered."""
    for parameter in engine.module.parameters():
        yield getattr(parameter, "ds_tensor", parameter.data)


def _states(engine: DeepSpeedEngine) -> Iterable[torch.Tensor]:
    """Moments and master weights of the optimizer at the bottom of DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for parameter, state in optimizer.state.items():
        yield parameter.data
        yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim() > 0)


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by address, of the memory behind tensors on the accelerator; views share it."""
    device_type = ranks.device_type()
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == device_type)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _runtime_bytes() -> int | None:
    """Other processes on the card are counted too: it is a measure where there are none."""
    if ranks.device_type() != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())
