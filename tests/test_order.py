"""The global order: permutations by epoch, random access, and the same for any world size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsllm.data.order import sample_ids, source_seed

seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, num_samples=st.integers(1, 3000), epoch=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(seed: int, num_samples: int, epoch: int) -> None:
    ids = sample_ids(seed, num_samples, np.arange(epoch * num_samples, (epoch + 1) * num_samples))
    assert sorted(ids.tolist()) == list(range(num_samples))


@given(seed=seeds, num_samples=st.integers(50, 3000), epoch=st.integers(0, 1000))
def test_epochs_differ(seed: int, num_samples: int, epoch: int) -> None:
    first, second = sample_ids(
        seed, num_samples, np.arange(epoch * num_samples, (epoch + 2) * num_samples).reshape(2, num_samples)
    )
    assert (first != second).mean() > 0.5


@given(seed=seeds, num_samples=st.integers(50, 3000))
def test_seeds_differ(seed: int, num_samples: int) -> None:
    everything = np.arange(num_samples)
    assert (sample_ids(seed, num_samples, everything) != sample_ids(seed ^ 1, num_samples, everything)).mean() > 0.5


@given(
    seed=seeds, num_samples=st.integers(1, 10**12), positions=st.lists(st.integers(0, 10**15), min_size=1, max_size=50)
)
def test_a_sample_depends_on_its_own_position_alone(seed: int, num_samples: int, positions: list[int]) -> None:
    together = sample_ids(seed, num_samples, positions)
    alone = [sample_ids(seed, num_samples, position).item() for position in positions]
    assert together.tolist() == alone
    assert all(0 <= index < num_samples for index in alone)


@pytest.mark.parametrize("num_samples", [997, 4096, 100_003])
def test_neighbours_land_anywhere(num_samples: int) -> None:
    ids = sample_ids(1337, num_samples, np.arange(num_samples))
    # Of two independent uniform orders the correlation is about 1 / sqrt(n), and the mean gap is n / 3.
    assert abs(np.corrcoef(ids, np.arange(num_samples))[0, 1]) < 5 / np.sqrt(num_samples)
    assert np.abs(np.diff(ids)).mean() == pytest.approx(num_samples / 3, rel=0.1)


def test_first_positions_are_uniform_over_epochs() -> None:
    epochs, num_samples = 20_000, 10
    firsts = sample_ids(7, num_samples, np.arange(epochs) * num_samples)
    assert np.bincount(firsts, minlength=num_samples) == pytest.approx(epochs / num_samples, rel=0.15)


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run continues on the next sample only as long as these numbers stay."""
    assert sample_ids(1337, 1000, np.arange(998, 1004)).tolist() == [415, 194, 51, 792, 747, 314]
    assert source_seed(1337, "news") == 4638219743090548972


@given(seed=seeds, labels=st.lists(st.text(max_size=5), min_size=2, max_size=10, unique=True))
def test_sources_have_seeds_of_their_own(seed: int, labels: list[str]) -> None:
    found = {source_seed(seed, label) for label in labels} | {source_seed(seed ^ 1, label) for label in labels}
    assert len(found) == 2 * len(labels)
    assert all(0 <= one < 2**64 for one in found)
    assert sample_ids(max(found), 1000, [0]).shape == (1,)
