"""Who is behind, from what the ranks report of themselves."""

from __future__ import annotations

from dataclasses import replace

from dsllm.engine.activity import LONG_SECONDS, Activity
from dsllm.engine.reports import Finding, Report, find_hang

STUCK = Report(1, "host-b", beat=9, ticks=40, step=3, phase="backward", idle_seconds=25.0, allowed_seconds=20.0)
WAITS = Report(0, "host-a", beat=9, ticks=41, step=3, phase="step", idle_seconds=24.0, allowed_seconds=20.0)


def test_a_report_comes_back_as_it_was_written() -> None:
    assert Report.from_json(STUCK.to_json()) == STUCK


def test_the_rank_that_has_come_least_far_is_named_with_its_place() -> None:
    reason = "rank 1 on host-b: no progress for 25.0s, in step 3, backward; the other ranks wait"
    assert find_hang([WAITS, STUCK]) == Finding("hang", reason, (1,))


def test_of_ranks_that_came_as_far_the_one_outside_a_collective_is_behind() -> None:
    in_collective = replace(WAITS, ticks=STUCK.ticks, phase="backward", waits=True)
    assert find_hang([in_collective, STUCK]).reason.startswith("rank 1 on host-b: ")


def test_where_all_stand_at_the_same_point_none_is_blamed() -> None:
    ranks = [replace(STUCK, rank=rank, waits=True) for rank in range(3)]
    reason = "no rank has made progress for 25.0s, and none is behind the others: step 3, backward"
    assert find_hang(ranks) == Finding("hang", reason, ())


def test_several_ranks_behind_are_all_named() -> None:
    ranks = [WAITS, STUCK, replace(STUCK, rank=5)]
    found = find_hang(ranks)
    assert found.reason.startswith("rank 1 on host-b, rank 5 on host-b: no progress for 25.0s")
    assert found.ranks == (1, 5)


def test_a_rank_alone_is_named() -> None:
    assert find_hang([STUCK]).reason.startswith("rank 1 on host-b: no progress for 25.0s")


def test_ranks_ahead_may_wait_as_long_as_the_one_behind_may_take() -> None:
    saving = replace(STUCK, phase="saving", allowed_seconds=1800.0)
    assert find_hang([replace(WAITS, idle_seconds=500.0), saving]) is None


def test_a_rank_behind_that_moves_is_no_hang() -> None:
    assert find_hang([WAITS, replace(STUCK, idle_seconds=1.0)]) is None


def test_a_rank_that_leaves_is_no_hang() -> None:
    assert find_hang([WAITS, replace(STUCK, is_leaving=True)]) is None


def test_work_of_one_piece_and_the_first_step_may_take_longer() -> None:
    activity = Activity()
    assert activity.allowed_seconds(20.0) == LONG_SECONDS
    activity.begin_step(101)
    activity("forward")
    assert activity.allowed_seconds(20.0) == LONG_SECONDS, "the first step of this start compiles"
    activity.begin_step(102)
    activity("forward")
    assert activity.allowed_seconds(20.0) == 20.0
    activity("saving")
    assert activity.allowed_seconds(20.0) == LONG_SECONDS
    assert activity.allowed_seconds(7200.0) == 7200.0


def test_each_micro_batch_of_an_evaluation_ticks() -> None:
    activity = Activity()
    sets = activity.counting({"news": lambda: [1, 2], "code": lambda: [3]})
    before = activity.ticks
    assert {label: list(open_set()) for label, open_set in sets.items()} == {"news": [1, 2], "code": [3]}
    assert activity.ticks == before + 3
    assert activity.phase == "evaluation"
