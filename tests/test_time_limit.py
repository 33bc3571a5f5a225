"""When the clock ends a run."""

from __future__ import annotations

import pytest

from dsllm.engine.time_limit import MARGIN_SECONDS, TimeLimit, slurm_job_end
from dsllm.errors import UserError


class Clock:
    """Seconds since 1970, as the test says."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def rounds_until_stopped(limit: TimeLimit, clock: Clock, round_seconds: float) -> int:
    """Steps that the loop does, each with what surrounds it."""
    for done in range(1, 10_000):
        clock.now += round_seconds
        if limit.reached():
            return done
    raise AssertionError("it never stops")


def test_without_a_limit_a_run_never_stops() -> None:
    clock = Clock()
    limit = TimeLimit(clock.now, clock=clock)
    clock.now += 1e9
    assert limit.reached() is None


def test_stop_after_counts_from_the_start_and_is_told_as_it_was_given() -> None:
    clock = Clock()
    limit = TimeLimit(clock.now, stop_after_seconds=13_800, clock=clock)
    clock.now += 13_799
    assert limit.reached() is None
    clock.now += 1
    assert limit.reached() == "--stop-after 3h50m"


def test_a_job_is_left_in_time_for_the_longest_step_the_longest_save_and_a_minute() -> None:
    clock = Clock()
    ends = clock.now + 3600
    limit = TimeLimit(clock.now, job_ends=ends, clock=clock)
    limit.reached()
    clock.now += 100  # one slow step
    limit.reached()
    limit.save_took(200)
    clock.now += 200
    rounds_until_stopped(limit, clock, round_seconds=10)
    left = ends - clock.now
    assert MARGIN_SECONDS + 100 + 200 - 10 < left <= MARGIN_SECONDS + 100 + 200


def test_a_save_between_two_steps_is_not_counted_as_part_of_a_step() -> None:
    clock = Clock()
    ends = clock.now + 3600
    limit = TimeLimit(clock.now, job_ends=ends, clock=clock)

    limit.reached()
    clock.now += 10
    limit.reached()
    clock.now += 500
    limit.save_took(500)
    rounds_until_stopped(limit, clock, round_seconds=10)
    assert ends - clock.now == pytest.approx(MARGIN_SECONDS + 500 + 10, abs=10)


def test_the_end_of_a_job_is_told_with_the_time_that_is_left() -> None:
    clock = Clock()
    limit = TimeLimit(clock.now, job_ends=clock.now + 50, clock=clock)
    assert limit.reached() == "the end of the Slurm job, in 50.0s,"


def test_slurm_tells_the_end_of_its_job_and_nothing_outside_of_one() -> None:
    assert slurm_job_end({}) is None
    assert slurm_job_end({"SLURM_JOB_END_TIME": "1732600000"}) == 1_732_600_000
    with pytest.raises(UserError, match="SLURM_JOB_END_TIME: given 'noon'; must be seconds since 1970"):
        slurm_job_end({"SLURM_JOB_END_TIME": "noon"})
