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

    Raises UserError, naming `source`, where none is left.
    """
    seconds = [float(record["step_seconds"]) for record in records[WARM_UP_STEPS:] if "val_loss" not in record]
    if not seconds:
        raise UserError(
            f"{source}: {len(records)} steps, none of them to measure by; the first {WARM_UP_STEPS} and those with an "
            f"evaluation are left out; train {2 * WARM_UP_STEPS} steps or more"
        )
    return median(seconds), len(seconds)


def calibrate(
    run: Workload, machine: Machine, micro_batch_size: int, kernels: Kernels, measured: tuple[float, int]
) -> Calibration:
    """Compare the measured median with what is predicted for the same run on the same machine."""
    predicted = step_time(run, machine, micro_batch_size, kernels).total_seconds
    return Calibration(machine, measured[0], predicted, measured[1])
