"""Mixing: shares that hold over every prefix of the run, each source's samples once an epoch, any position at once."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsllm.data.mixture import MixedSource, Mixture, PeriodicTurns, SourceUse, TreeTurns, repeated_too_often, turns
from dsllm.data.order import sample_ids

SEED = 1337
decimals = st.integers(1, 999).map(lambda thousandths: thousandths / 1000)
any_weights = st.lists(st.floats(1e-9, 1e9), min_size=2, max_size=12)


def shares(weights: list[float]) -> list[Fraction]:
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def furthest_from_shares(owners: np.ndarray, weights: list[float]) -> Fraction:
    """The largest distance of any count from its share, over every prefix."""
    furthest = Fraction(0)
    for owner, share in enumerate(shares(weights)):
        counts = np.cumsum(owners == owner).tolist()
        furthest = max(furthest, *(abs(count - share * (n + 1)) for n, count in enumerate(counts)))
    return furthest


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(decimals, min_size=2, max_size=8))
def test_shares_of_few_decimals_hold_within_one_sample_over_every_prefix(weights: list[float]) -> None:
    taken = turns(weights)
    assert isinstance(taken, PeriodicTurns)
    owners, _ = taken.draw(np.arange(3000))
    assert furthest_from_shares(owners, weights) <= 1 - Fraction(1, 2 * len(weights) - 2)


@settings(max_examples=30, deadline=None)
@given(weights=any_weights)
def test_any_shares_hold_within_two_samples_over_every_prefix(weights: list[float]) -> None:
    taken = turns(weights)
    assume(isinstance(taken, TreeTurns))
    owners, _ = taken.draw(np.arange(2000))
    assert furthest_from_shares(owners, weights) <= (1 if len(weights) <= 3 else Fraction(168, 100))


@settings(max_examples=50, deadline=None)
@given(weights=st.one_of(any_weights, st.lists(decimals, min_size=2, max_size=8)), first=st.integers(0, 10**13))
def test_any_position_is_known_without_the_ones_before(weights: list[float], first: int) -> None:
    taken = turns(weights)
    owners, draws = taken.draw(np.arange(first, first + 500))
    for owner in range(len(weights)):
        begin, end = (taken.counts(position)[owner] for position in (first, first + 500))
        assert draws[owners == owner].tolist() == list(range(begin, end))
    assert sum(taken.counts(first)) == first


@pytest.mark.parametrize("weights", [[51, 49], [0.51, 0.49], [0.2, 0.3, 0.4999, 0.0001], [1 / 3, 0.25, 0.1]])
def test_a_million_samples_hold_the_shares_within_one(weights: list[float]) -> None:
    counts = turns(weights).counts(1_000_000)
    assert all(abs(count - 1_000_000 * share) < 1 for count, share in zip(counts, shares(weights), strict=True))


def test_every_window_has_the_shares() -> None:
    owners, _ = turns([0.51, 0.4861, 0.0039]).draw(np.arange(200_000))
    for window in np.split(owners == 0, 100):
        assert abs(window.sum() - 0.51 * 2000) < 2


def mixture(*weights: float | None, samples: tuple[int, ...] = (700, 300, 50)) -> Mixture:
    sources = [
        MixedSource(label, number, weight) for label, number, weight in zip("abc", samples, weights, strict=False)
    ]
    return Mixture(sources, SEED)


def test_without_weights_every_sample_of_all_sources_is_read_once_an_epoch() -> None:
    mixed = mixture(None, None, None)
    for epoch in range(3):
        drawn = mixed.draw(np.arange(epoch * 1050, (epoch + 1) * 1050))
        assert sorted(zip(drawn.sources.tolist(), drawn.samples.tolist(), strict=True)) == [
            (source, sample) for source, size in enumerate((700, 300, 50)) for sample in range(size)
        ]


def test_one_source_keeps_the_global_order() -> None:
    expected = sample_ids(SEED, 700, np.arange(2000)).tolist()
    for weight in (None, 1.0, 0.3):
        drawn = mixture(weight).draw(np.arange(2000))
        assert drawn.samples.tolist() == expected
        assert set(drawn.sources.tolist()) == {0}


@pytest.mark.parametrize("weights", [(0.6, 0.3, 0.1), (0.123456789, 3.0, 0.77)])
def test_every_source_of_a_mix_is_read_once_in_each_of_its_own_epochs(weights: tuple[float, ...]) -> None:
    drawn = mixture(*weights).draw(np.arange(20_000))
    for source, size in enumerate((700, 300, 50)):
        own = drawn[drawn.sources == source].samples
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


def test_sources_of_a_mix_are_read_in_unrelated_orders() -> None:
    drawn = mixture(0.5, 0.5, samples=(500, 500)).draw(np.arange(1000))
    assert (drawn[drawn.sources == 0].samples != drawn[drawn.sources == 1].samples).mean() > 0.9


def test_a_source_of_weight_0_is_never_drawn() -> None:
    drawn = mixture(0.5, 0.0, 0.5).draw(np.arange(5000))
    assert set(drawn.sources.tolist()) == {0, 2}
    assert [use.draws for use in mixture(0.5, 0.0, 0.5).uses(5000)] == [2500, 0, 2500]


def test_the_order_of_a_mix_never_changes_between_versions() -> None:
    """A resumed run continues on the next sample only as long as these numbers stay."""
    few, many = mixture(0.6, 0.3, 0.1), mixture(0.123456789, 3.0, 0.77)
    for mixed, (sources, samples) in ((few, FEW_DECIMALS), (many, MANY_DECIMALS)):
        drawn = mixed.draw(np.arange(1000, 1008))
        assert (drawn.sources.tolist(), drawn.samples.tolist()) == (sources, samples)


FEW_DECIMALS = ([0, 1, 0, 0, 1, 0, 2, 0], [43, 26, 279, 514, 253, 433, 27, 618])
MANY_DECIMALS = ([2, 1, 1, 1, 2, 1, 1, 1], [26, 265, 30, 70, 45, 172, 54, 244])


@pytest.mark.parametrize("weights", [(None, None, None), (0.6, 0.3, 0.1)])
def test_the_uses_of_a_run_are_what_it_draws(weights: tuple[float | None, ...]) -> None:
    mixed = mixture(*weights)
    sources = mixed.draw(np.arange(10 * 1050)).sources
    uses = mixed.uses(10 * 1050)
    assert [use.draws for use in uses] == np.bincount(sources).tolist()
    assert [use.epochs for use in uses] == [use.draws / use.samples for use in uses]
    assert sum(use.share for use in uses) == pytest.approx(1)


def test_the_uses_of_a_run_are_told_in_a_sentence() -> None:
    first, *_, last = mixture(0.6, 0.3, 0.1).uses(10_000)
    assert first.sentence() == "source 'a': 60.0% of the run's samples, 8.57 epochs of its 700"
    assert last.sentence() == "source 'c': 10.0% of the run's samples, 20 epochs of its 50"
    often = SourceUse("a", 1.0, 10, 12_345, padding_share=0.0)
    assert often.sentence().endswith("1,234 epochs of its 10")
    padded = SourceUse("a", 1.0, 10, 20, padding_share=0.0123)
    assert padded.sentence().endswith("2 epochs of its 10; 1.23% of their positions are padding")


def test_a_source_that_is_repeated_too_often_is_named_with_what_to_do() -> None:
    uses = mixture(0.6, 0.3, 0.1).uses(4000)
    assert repeated_too_often(uses, 4.0) == [
        "source 'c': the run sees it 8 times, more than data.max_epochs = 4; add text to it, lower its weight, or "
        "shorten the run"
    ]
    assert repeated_too_often(uses, 8.0) == []
