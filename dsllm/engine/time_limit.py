"""When a run ends by the clock: by the user's word, or in time before Slurm would kill its job."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from dsllm.errors import UserError
from dsllm.units import format_duration

SLURM_END = "SLURM_JOB_END_TIME"
"""Slurm's name for the second, since 1970, at which it kills the job."""
MARGIN_SECONDS = 60.0
"""For what is not measured: writing the last records, leaving the other ranks, a file system that is slower today."""


class TimeLimit:
    """Asked once a step whether it is reached.

    `stop_after_seconds` counts from `started`. `job_ends` is kept with room for the longest round so far (a step with
    what came between it and the next, such as an evaluation), the longest save so far, and a minute.
    """

    def __init__(
        self,
        started: float,
        stop_after_seconds: float | None = None,
        job_ends: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Times are seconds since 1970, as `clock` tells them."""
        self._clock = clock
        self._stop_after_seconds = stop_after_seconds
        self._started = started
        self._job_ends = job_ends
        self._last_asked: float | None = None
        self._saved_seconds = 0.0
        self._longest_round_seconds = 0.0
        self._longest_save_seconds = 0.0

    def reached(self) -> str | None:
        """Why the run has to stop now, as `--stop-after 3h50m`; None where it may go on."""
        now = self._clock()
        if self._last_asked is not None:
            round_seconds = now - self._last_asked - self._saved_seconds
            self._longest_round_seconds = max(self._longest_round_seconds, round_seconds)
        self._last_asked, self._saved_seconds = now, 0.0
        if self._stop_after_seconds is not None and now - self._started >= self._stop_after_seconds:
            return f"--stop-after {format_duration(self._stop_after_seconds)}"
        if self._job_ends is not None and now + self._needed_seconds() >= self._job_ends:
            return f"the end of the Slurm job, in {format_duration(self._job_ends - now)},"
        return None

    def save_took(self, seconds: float) -> None:
        """A checkpoint was written in so long, from its start until a resume could use it."""
        self._saved_seconds += seconds
        self._longest_save_seconds = max(self._longest_save_seconds, seconds)

    def _needed_seconds(self) -> float:
        return self._longest_round_seconds + self._longest_save_seconds + MARGIN_SECONDS


def slurm_job_end(environment: Mapping[str, str]) -> float | None:
    """When Slurm ends the job that this process belongs to, in seconds since 1970; None outside Slurm.

    Raises UserError where the variable holds something else.
    """
    text = environment.get(SLURM_END)
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f"{SLURM_END}: given '{text}'; must be seconds since 1970, as Slurm sets it; unset it")
    return float(text)
