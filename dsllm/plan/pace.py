"""A run's measured steps in the place of assumptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from dsllm.errors import UserError
from dsllm.plan.cost import Machine, step_time
from dsllm.plan.work import Kernels
from dsllm.plan.workload import Workload

WARM_UP_STEPS = 5
"""Steps at the start that compile, allocate and tune."""


@dataclass(frozen=True)
class Calibration:
    """How a measured run compares with its prediction."""

    machine: Machine
    measured_seconds: float
    predicted_seconds: float
    num_steps: int

    @property
    def pace(self) -> float:
        """What predicted seconds are multiplied with."""
        return self.measured_seconds / self.predicted_seconds


def measured_step_seconds(records: Sequence[Mapping[str, Any]], source: str) -> tuple[float, int]:
    """Median seconds of the steps after the warm-up, those with an evaluation left out, and how many these are.

    Raises UserError, naming `source`, where none is left, or one was not timed.
    """
    seconds = [_seconds(record, source) for record in records[WARM_UP_STEPS:] if "val_loss" not in record]
    if not seconds:
        raise UserError(
            f"{source}: {len(records)} steps, none of them to measure by; the first {WARM_UP_STEPS} and those with an "
            f"evaluation are left out; train {2 * WARM_UP_STEPS} steps or more"
        )
    return median(seconds), len(seconds)


def _seconds(record: Mapping[str, Any], source: str) -> float:
    seconds: Any = record.get("step_seconds")
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not 0 < seconds < float("inf"):
        raise UserError(
            f"{source}: step {record.get('step', 'without a number')}: step_seconds: given {seconds!r}; a step takes "
            "time; remove its line, or measure by another run"
        )
    return float(seconds)


def calibrate(
    run: Workload, machine: Machine, micro_batch_size: int, kernels: Kernels, measured: tuple[float, int]
) -> Calibration:
    """Compare the measured median with what is predicted for the same run on the same machine.

    Raises UserError for a precision that the machine does not have.
    """
    if run.precision not in machine.gpu.flops:
        raise UserError(
            f"--calibrate-from: given a run in {run.precision} on {machine.gpu.name}, which has no such arithmetic by "
            "its figures; name another --gpu, or add it to the flops of a --hardware file"
        )
    predicted = step_time(run, machine, micro_batch_size, kernels).total_seconds
    return Calibration(machine, measured[0], predicted, measured[1])
