"""How parameters are cut into shares and gradients fill buckets, on tensors small enough to count."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsllm.plan.model_shape import Tensor
from dsllm.plan.partitions import Flush, Partition, flushes, partition

# an embedding of 10, two matrices of 6 with a vector each
TENSORS = (Tensor(10, True), Tensor(6, True), Tensor(2, False), Tensor(6, True), Tensor(2, False))

tensor_lists = st.lists(st.builds(Tensor, st.integers(1, 50), st.booleans()), min_size=1, max_size=12).map(tuple)


def test_one_rank_has_everything() -> None:
    assert partition(TENSORS, 1) == Partition(elements=22 + 4, touched=26, largest_piece=10)


def test_a_share_keeps_the_whole_of_what_it_touches() -> None:
    # matrices 22 / 2 = 11, made even: 12. Rank 0 steps the embedding and 2 of the first matrix, and touches both whole;
    # of the vectors it has one
    assert partition(TENSORS, 2) == Partition(elements=12 + 2, touched=10 + 6 + 2, largest_piece=10)


def test_gradients_fill_buckets_from_the_last_module_on() -> None:
    assert flushes(TENSORS, 1, bucket_elements=10) == (
        Flush(elements=10, largest_piece=6, pieces=3, runs=1, beside_bucket=0),
        Flush(elements=6, largest_piece=6, pieces=1, runs=1, beside_bucket=0),
        Flush(elements=10, largest_piece=10, pieces=1, runs=1, beside_bucket=0),
    )


def test_a_tensor_larger_than_the_bucket_is_reduced_beside_it() -> None:
    assert flushes(TENSORS, 1, bucket_elements=8)[-1].beside_bucket == 10


def test_only_what_goes_to_several_places_is_copied() -> None:
    one = flushes(TENSORS, 1, bucket_elements=100)[0]
    assert (one.copied, one.copied_merged) == (26, 0)
    two = flushes(TENSORS, 2, bucket_elements=100)[0]
    assert (two.copied, two.copied_merged) == (26, 26)


@given(tensor_lists, st.integers(1, 9), st.integers(1, 200))
def test_everything_is_reduced_once(tensors: tuple[Tensor, ...], world_size: int, bucket: int) -> None:
    assert sum(flush.elements for flush in flushes(tensors, world_size, bucket)) == sum(t.elements for t in tensors)


@given(tensor_lists, st.integers(1, 40))
def test_more_ranks_never_step_more(tensors: tuple[Tensor, ...], world_size: int) -> None:
    assert partition(tensors, world_size + 1).elements <= partition(tensors, world_size).elements
