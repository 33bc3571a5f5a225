"""A jump of the loss is always found, noise around a falling curve never is."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllm.engine.spikes import DEVIATIONS_PER_MAD, SpikeDetector

WINDOW, THRESHOLD = 40, 8.0


def falling_curve(seed: int, noise: float, steps: int) -> list[float]:
    """As a pre-training loss falls: from 11 towards 3, with normal noise."""
    generator = random.Random(seed)
    return [3 + 8 * math.exp(-step / 60) + generator.gauss(0, noise) for step in range(steps)]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), noise=st.floats(0, 0.3))
def test_noise_around_a_falling_curve_is_no_spike(seed: int, noise: float) -> None:
    detector = SpikeDetector(WINDOW, THRESHOLD)
    assert [detector.observe(loss) for loss in falling_curve(seed, noise, 400)] == [None] * 400


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), noise=st.floats(0.05, 0.3), at=st.integers(WINDOW, 300), excess=st.floats(0.01, 1e3))
def test_a_jump_beyond_the_threshold_is_found_and_scored(seed: int, noise: float, at: int, excess: float) -> None:
    losses = falling_curve(seed, noise, at)
    last = losses[-WINDOW:]
    median = statistics.median(last)
    deviation = DEVIATIONS_PER_MAD * statistics.median(abs(loss - median) for loss in last)
    score = THRESHOLD + excess
    spike = SpikeDetector(WINDOW, THRESHOLD, losses).observe(median + score * max(deviation, 0.005 * median))
    assert spike is not None
    assert spike.median == median
    assert spike.score == pytest.approx(score)


def test_nothing_is_a_spike_before_half_the_window_is_known() -> None:
    detector = SpikeDetector(10, THRESHOLD)
    assert [detector.observe(loss) for loss in (7.0, 6.0, 90.0, 5.5, 5.4)] == [None] * 5
    assert detector.observe(90.0) is not None


def test_a_flat_loss_has_room_to_breathe() -> None:
    detector = SpikeDetector(10, THRESHOLD, [3.0] * 10)
    assert detector.observe(3.11) is None
    assert detector.observe(3.13) is not None


def test_a_level_that_lasts_becomes_the_usual_one() -> None:
    detector = SpikeDetector(10, THRESHOLD, [3.0] * 10)
    assert [detector.observe(9.0) is not None for _ in range(20)] == [True] * 5 + [False] * 15


def test_a_fall_is_no_spike_however_deep() -> None:
    assert SpikeDetector(10, THRESHOLD, [9.0] * 10).observe(0.1) is None


def test_a_loss_of_zero_has_no_spread_and_still_a_spike() -> None:
    assert SpikeDetector(10, THRESHOLD, [0.0] * 10).observe(0.5).score == math.inf
