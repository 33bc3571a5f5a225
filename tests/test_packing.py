"""Best-fit packing: every token once, no document cut that fits, and a plan that is made once and never stale."""

from __future__ import annotations

import fcntl
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_shards import numbered_documents, open_stream

from dsllm.data.packing import PackingPlan, open_plan, pack

document_lengths = st.lists(st.integers(2, 100), min_size=1, max_size=80)
sequence_lengths = st.integers(1, 40)


def plan_for(lengths: list[int], sequence_length: int) -> PackingPlan:
    ends = np.cumsum(lengths)
    return pack(ends - lengths, int(ends[-1]), sequence_length)


def all_pieces(plan: PackingPlan) -> list[list[tuple[int, int]]]:
    return [plan.pieces_of(sequence) for sequence in range(len(plan))]


def best_fit_one_by_one(lengths: list[int], sequence_length: int) -> list[int]:
    """Rooms left, ascending, when each piece goes by itself into the fullest sequence that holds it."""
    whole = [sequence_length for length in lengths for _ in range(length // sequence_length)]
    pieces = sorted([*whole, *(length % sequence_length for length in lengths)], reverse=True)
    rooms: list[int] = []
    for piece in filter(None, pieces):
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else sequence_length) - piece)
    return sorted(rooms)


@given(lengths=document_lengths, sequence_length=sequence_lengths)
def test_every_token_is_in_one_piece(lengths: list[int], sequence_length: int) -> None:
    pieces = sorted(piece for sequence in all_pieces(plan_for(lengths, sequence_length)) for piece in sequence)
    tokens = [token for start, length in pieces for token in range(start, start + length)]
    assert tokens == list(range(sum(lengths)))


@given(lengths=document_lengths, sequence_length=sequence_lengths)
def test_no_sequence_overflows_and_no_document_that_fits_is_cut(lengths: list[int], sequence_length: int) -> None:
    plan = plan_for(lengths, sequence_length)
    pieces = {piece for sequence in all_pieces(plan) for piece in sequence}
    assert all(0 < sum(length for _, length in sequence) <= sequence_length for sequence in all_pieces(plan))
    starts = np.cumsum([0, *lengths])
    assert all(
        (start, length) in pieces for start, length in zip(starts, lengths, strict=False) if length <= sequence_length
    )
    # A long document becomes whole sequences and one rest.
    assert len(pieces) == sum(-(-length // sequence_length) for length in lengths)


@given(lengths=document_lengths, sequence_length=sequence_lengths)
def test_sequences_are_as_full_as_best_fit_makes_them_one_by_one(lengths: list[int], sequence_length: int) -> None:
    plan = plan_for(lengths, sequence_length)
    assert sorted(sequence_length - plan.tokens) == best_fit_one_by_one(lengths, sequence_length)


@given(lengths=document_lengths, sequence_length=sequence_lengths)
def test_a_plan_knows_the_tokens_of_its_sequences(lengths: list[int], sequence_length: int) -> None:
    plan = plan_for(lengths, sequence_length)
    assert plan.tokens.tolist() == [sum(length for _, length in sequence) for sequence in all_pieces(plan)]


def test_sequences_and_their_pieces_come_in_the_order_of_the_stream() -> None:
    lengths = np.random.default_rng(3).integers(2, 60, 500).tolist()
    pieces = all_pieces(plan_for(lengths, 64))
    assert [sequence[0] for sequence in pieces] == sorted(sequence[0] for sequence in pieces)
    assert all(sequence == sorted(sequence) for sequence in pieces)


def test_short_documents_leave_next_to_no_padding() -> None:
    lengths = np.random.default_rng(7).lognormal(5, 1, 20_000).astype(int) + 2
    plan = plan_for(lengths.tolist(), 1024)
    assert sum(lengths) / (len(plan) * 1024) > 0.999


def test_a_plan_never_changes_between_versions() -> None:
    """A resumed run continues on the next sample only as long as these numbers stay."""
    plan = plan_for([7, 3, 12, 5, 2, 9, 4, 31], 10)
    assert all_pieces(plan) == GOLDEN


GOLDEN = [
    [(0, 7), (7, 3)],
    [(10, 10)],
    [(20, 2), (27, 2)],
    [(22, 5), (38, 4), (72, 1)],
    [(29, 9)],
    [(42, 10)],
    [(52, 10)],
    [(62, 10)],
]


def plan_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.plan"))


def test_a_plan_is_kept_in_one_file_and_read_from_there(tmp_path: Path) -> None:
    shards = open_stream(tmp_path, numbered_documents([30, 300, 5, 80, 12, 41]))
    made = open_plan(shards, 64)
    (file,) = plan_files(tmp_path)
    written = file.stat()
    assert all_pieces(open_plan(shards, 64)) == all_pieces(made)
    assert open_plan(shards, 64).tokens.tolist() == made.tokens.tolist()
    assert all_pieces(made) == all_pieces(pack(shards.document_starts(), len(shards), 64))
    assert file.stat().st_mtime_ns == written.st_mtime_ns
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_sequences_and_other_documents_have_plans_of_their_own(tmp_path: Path) -> None:
    shards = open_stream(tmp_path, numbered_documents([30, 300, 5]))
    assert len(open_plan(shards, 64)) != len(open_plan(shards, 32))
    assert len(plan_files(tmp_path)) == 2
    changed = open_stream(tmp_path, numbered_documents([30, 299, 6]))
    assert all_pieces(open_plan(changed, 64)) == all_pieces(pack(changed.document_starts(), len(changed), 64))
    assert len(plan_files(tmp_path)) == 3


@pytest.mark.parametrize("damage", [b"", b"nothing", b"dsllm packing 2\n"])
def test_a_plan_that_was_cut_short_is_made_again(tmp_path: Path, damage: bytes) -> None:
    shards = open_stream(tmp_path, numbered_documents([30, 300, 5]))
    expected = all_pieces(open_plan(shards, 64))
    (file,) = plan_files(tmp_path)
    content = file.read_bytes()
    file.write_bytes(damage)
    assert all_pieces(open_plan(shards, 64)) == expected
    assert file.read_bytes() == content


def test_a_plan_with_any_bit_flipped_is_made_again(tmp_path: Path) -> None:
    shards = open_stream(tmp_path, numbered_documents([30, 300, 5]))
    expected = all_pieces(open_plan(shards, 64))
    (file,) = plan_files(tmp_path)
    content = file.read_bytes()
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << index % 8
        file.write_bytes(damaged)
        assert all_pieces(open_plan(shards, 64)) == expected
        assert file.read_bytes() == content


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    shards = open_stream(tmp_path, numbered_documents([30, 300, 5]))
    left, in_work = (tmp_path / f".text-train-packed-32-abc.plan.{name}" for name in ("left", "inwork"))
    left.write_bytes(b"half")
    with in_work.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_plan(shards, 64)
        assert not left.exists()
        assert in_work.exists()


def test_where_no_file_can_be_written_the_plan_stays_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = open_stream(tmp_path, numbered_documents([30, 300, 5]))
    expected = all_pieces(open_plan(shards, 64))
    (file,) = plan_files(tmp_path)
    file.unlink()
    file.mkdir()  # stands in the way of anybody, also of root, whom no permissions stop
    with caplog.at_level(logging.INFO):
        assert all_pieces(open_plan(shards, 64)) == expected
    assert "every process packs for itself" in caplog.text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
