"""A run, the ranks that it is to run on, and what makes one way of running another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dsllm.plan.workload import Workload


@dataclass(frozen=True)
class Way:
    """A run on a number of ranks."""

    run: Workload
    world_size: int
    micro_batch_size: int
    has_batch: bool = True
    """Whether the global batch is given, so that micro-batch and ranks must divide it; else it grows with the ranks."""


def changed_settings(given: Way, changed: Way) -> dict[str, str | int]:
    """The fields of a spec that make the one way the other, with their new values as `--set` takes them.

    They name all that a stage drops, too, so that the spec with them is one that `dsllm validate` takes.
    """
    before, after = _fields(given), _fields(changed)
    settings: dict[str, str | int] = {name: _typed(new) for name, new in after.items() if new != before[name]}
    if "nvme" in before.values() and "nvme" not in after.values():
        settings["zero.nvme_path"] = "null"
    return settings


def _fields(way: Way) -> dict[str, Any]:
    run = way.run
    return {
        "batch.micro_batch_size": way.micro_batch_size,
        **{f"zero.{name}": value for name, value in asdict(run.zero).items()},
        "training.loss": run.loss,
        "training.activation_checkpointing": run.activation_checkpointing,
        "training.gradient_accumulation_precision": run.gradient_accumulation_precision,
    }


def _typed(value: Any) -> str | int:
    """As YAML has it."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else value
