"""Learning rates: pure functions of the step, with the shape that their names promise."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllm.engine.schedule import learning_rate
from dsllm.spec.sections import Schedule

FALLING = ("cosine", "linear", "wsd")


@st.composite
def runs(draw: st.DrawFn, names: tuple[str, ...] = (*FALLING, "constant")) -> tuple[Schedule, float, int]:
    """A schedule that the rules admit, its peak, and the steps of the run."""
    train_steps = draw(st.integers(1, 1000))
    decay_fraction = draw(st.floats(0.01, 1.0))
    schedule = Schedule(
        name=draw(st.sampled_from(names)),
        warmup_steps=draw(st.integers(0, train_steps - math.ceil(decay_fraction * train_steps))),
        min_learning_rate_ratio=draw(st.floats(0.0, 1.0)),
        decay_fraction=decay_fraction,
    )
    return schedule, draw(st.floats(1e-6, 1.0)), train_steps


def rates(schedule: Schedule, peak: float, train_steps: int) -> list[float]:
    return [learning_rate(step, schedule, peak, train_steps) for step in range(train_steps)]


@given(runs())
@settings(deadline=None)
def test_a_rate_is_positive_but_at_the_end_and_never_above_the_peak(run: tuple[Schedule, float, int]) -> None:
    _, peak, _ = run
    found = rates(*run)
    assert all(rate > 0.0 for rate in found[:-1])
    assert found[-1] >= 0.0
    assert max(found) <= peak * (1 + 1e-12)


@given(runs())
@settings(deadline=None)
def test_warm_up_rises_in_even_steps_and_reaches_the_peak_on_its_last(run: tuple[Schedule, float, int]) -> None:
    schedule, peak, _ = run
    warm_up = rates(*run)[: schedule.warmup_steps]
    assert warm_up == pytest.approx([peak * (step + 1) / schedule.warmup_steps for step in range(len(warm_up))])
    assert not warm_up or warm_up[-1] == peak


@given(runs(FALLING))
@settings(deadline=None)
def test_after_warm_up_the_rate_never_rises_and_ends_at_its_share_of_the_peak(run: tuple[Schedule, float, int]) -> None:
    schedule, peak, train_steps = run
    after = rates(*run)[schedule.warmup_steps :]
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))
    if schedule.warmup_steps < train_steps:
        assert after[-1] == pytest.approx(peak * schedule.min_learning_rate_ratio, abs=1e-12)


@given(runs(("constant",)))
@settings(deadline=None)
def test_constant_stays_at_the_peak(run: tuple[Schedule, float, int]) -> None:
    schedule, peak, _ = run
    assert set(rates(*run)[schedule.warmup_steps :]) <= {peak}


@given(runs(("wsd",)))
@settings(deadline=None)
def test_wsd_is_stable_until_its_decay_begins(run: tuple[Schedule, float, int]) -> None:
    schedule, peak, train_steps = run
    decay_steps = schedule.decay_fraction * train_steps
    for step in range(schedule.warmup_steps, train_steps):
        if step + 1 <= train_steps - decay_steps - 1e-6:
            assert learning_rate(step, schedule, peak, train_steps) == peak


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (
            Schedule(name="cosine", warmup_steps=2, min_learning_rate_ratio=0.1),
            [0.5, 1.0, 0.868198, 0.55, 0.231802, 0.1],
        ),
        (Schedule(name="linear", warmup_steps=2, min_learning_rate_ratio=0.0), [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        (
            Schedule(name="wsd", warmup_steps=1, min_learning_rate_ratio=0.0, decay_fraction=0.5),
            [1.0, 1.0, 1.0, 2 / 3, 1 / 3, 0.0],
        ),
        (Schedule(name="constant", warmup_steps=3), [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_rates_of_a_run_of_six_steps(schedule: Schedule, expected: list[float]) -> None:
    assert rates(schedule, 1.0, 6) == pytest.approx(expected, abs=1e-6)


def test_the_rates_of_the_1b_preset() -> None:
    # 20e9 tokens in steps of 524,288: 38,147 of them; halfway the cosine is at the middle of peak and floor.
    schedule = Schedule(name="cosine", warmup_steps=715, min_learning_rate_ratio=0.1)
    for step, rate in ((0, 2.0e-4 / 715), (714, 2.0e-4), (715 + 37432 // 2 - 1, 1.1e-4), (38146, 2.0e-5)):
        assert learning_rate(step, schedule, 2.0e-4, 38147) == pytest.approx(rate, rel=1e-6)


def test_beyond_the_end_the_rate_stays_at_its_last_value() -> None:
    for name in FALLING:
        schedule = Schedule(name=name, warmup_steps=3)
        assert learning_rate(50, schedule, 1.0, 10) == pytest.approx(0.1)
