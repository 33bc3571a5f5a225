"""Why a run ended, from the signs as launchers, ssh and ranks give them."""

from __future__ import annotations

import signal
from typing import Any, get_args

import pytest

from dsllm.errors import Cause
from dsllm.launch.ending import CURABLE, GOES_ON, Ending, Signs, find_ending, signal_of
from dsllm.launch.hosts import HostError

LOST_B = HostError("b", "Connection closed by remote host", 255)


def word(cause: str, message: str = "why", rank: int = 1, is_own: bool = True, host: str = "b") -> dict[str, Any]:
    """What a rank writes."""
    return {"cause": cause, "message": message, "rank": rank, "host": host, "is_own": is_own, "time": 1.0}


def of_another(cause: str, message: str, rank: int = 0, host: str = "a") -> dict[str, Any]:
    return word(cause, message, rank, is_own=False, host=host)


# --- good ends -------------------------------------------------------------------------------------------------------


FINISHED = Ending("finished", "all steps are done")
STOPPED = Ending("stopped", "by SIGUSR2")


def test_a_run_that_ends_with_0_ended_as_it_says() -> None:
    ending = find_ending(Signs([0, 0], {"a": 0, "b": 0}, says=FINISHED))
    assert (ending.cause, ending.is_good, ending.exit_status) == ("finished", True, 0)
    ending = find_ending(Signs([0], asked_by="SIGUSR2", says=STOPPED))
    assert (ending, ending.exit_status) == (STOPPED, 0)


def test_a_signal_at_the_last_step_stops_nothing() -> None:
    assert find_ending(Signs([0], asked_by="SIGTERM", says=FINISHED)) == FINISHED


def test_a_run_that_has_not_come_to_its_end_has_not_finished_whatever_its_launcher_ends_with() -> None:
    """DeepSpeed's ends with 0 where a signal has ended it."""
    ending = find_ending(Signs([0]))
    assert (ending.cause, ending.message) == ("fault", "the launcher ended with status 0, and no rank said why")
    assert find_ending(Signs([247], says=FINISHED)).cause == "lost_rank"


def test_a_launch_that_is_stopped_before_its_ranks_can_save_is_interrupted_and_not_started_again() -> None:
    for signs in (
        Signs([-9], asked_by="SIGTERM"),
        Signs([143], {"a": 143}, asked_by="SIGTERM"),
        Signs([0], asked_by="SIGTERM"),
    ):
        ending = find_ending(signs)
        assert (ending.cause, ending.message) == ("interrupted", "SIGTERM ended it before the ranks could save")
        assert (ending.is_good, ending.exit_status, ending.is_curable) == (False, 1, False)


def test_what_fails_while_somebody_has_asked_for_the_end_is_not_started_again() -> None:
    ending = find_ending(Signs([1], words=[word("hang")], asked_by="SIGTERM"))
    assert (ending.cause, ending.was_asked, ending.is_curable) == ("hang", True, False)


@pytest.mark.parametrize("cause", ["disk", "user_error", "out_of_memory", "fault"])
def test_a_fault_while_a_stopped_run_saves_is_a_fault(cause: str) -> None:
    assert find_ending(Signs([1], words=[word(cause)], asked_by="SIGTERM")).cause == cause


# --- what a rank says of itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cause",
    ["user_error", "out_of_memory", "non_finite", "lost_host", "lost_rank", "hang", "communication", "disk", "fault"],
)
def test_a_rank_that_says_why_it_failed_is_believed(cause: str) -> None:
    ending = find_ending(Signs([1], words=[word(cause, "rank 1 on b: why")]))
    assert (ending.cause, ending.message) == (cause, "rank 1 on b: why")
    assert (ending.rank, ending.host) == (1, "b")


def test_every_cause_of_a_rank_can_be_told_and_is_curable_or_not() -> None:
    incurable = {"user_error", "out_of_memory", "non_finite", "disk"}
    assert {*CURABLE, *incurable} == set(get_args(Cause))
    assert CURABLE & incurable == set()


def test_a_rank_that_failed_by_itself_comes_before_those_that_it_took_along() -> None:
    words = [
        word("out_of_memory", "rank 3 on b: no memory", rank=3),
        of_another("out_of_memory", "rank 3 on b: no memory"),
    ]
    ending = find_ending(Signs([1], words=words))
    assert (ending.cause, ending.rank, ending.host) == ("out_of_memory", 3, "b")


def test_a_rank_that_is_out_of_memory_is_not_called_lost_though_its_end_looks_so() -> None:
    """The launcher kills the other ranks; ssh's clients end with what those do."""
    ending = find_ending(Signs([247, 255], {"a": 247, "b": 255}, words=[word("out_of_memory")]))
    assert ending.cause == "out_of_memory"


def test_the_advice_of_a_rank_is_left_out_since_the_supervisor_may_follow_it() -> None:
    assert find_ending(Signs([1], words=[word("hang", f"rank 1 on b hangs{GOES_ON}")])).message == "rank 1 on b hangs"


# --- lost hosts ------------------------------------------------------------------------------------------------------


def test_a_host_to_which_no_way_leads_is_lost_whatever_others_make_of_it() -> None:
    words = [word("communication", "rank 0 on a: connection reset", rank=0, host="a")]
    ending = find_ending(Signs([1, 255], {"a": 1}, lost=[LOST_B], words=words))
    assert (ending.cause, ending.host, ending.rank) == ("lost_host", "b", None)
    assert ending.message == "the way to b is gone: Connection closed by remote host"


def test_255_is_sshs_own_status() -> None:
    ending = find_ending(Signs([1], {"b": 255, "a": 1}))
    assert (ending.cause, ending.message) == ("lost_host", "the way to b is gone: ssh lost the connection")


def test_a_host_that_is_lost_while_all_else_ends_well_is_not_overlooked() -> None:
    assert find_ending(Signs([0], lost=[LOST_B])).cause == "lost_host"
    assert find_ending(Signs([0], lost=[LOST_B], says=FINISHED)) == FINISHED, "it was not needed any more"


def test_ranks_that_miss_another_tell_which() -> None:
    message = "rank 3 on b: not heard of for 15 s"
    ending = find_ending(Signs([1], words=[of_another("lost_host", message + GOES_ON)]))
    assert ending == Ending("lost_host", message, 3, "b")


# --- killed ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "number"),
    [
        (-9, signal.SIGKILL),  # Python's own
        (137, signal.SIGKILL),  # a shell's
        (247, signal.SIGKILL),  # DeepSpeed's, which exits with -9
        (-11, signal.SIGSEGV),
        (139, signal.SIGSEGV),
        (245, signal.SIGSEGV),
        (134, signal.SIGABRT),
        (135, signal.SIGBUS),
        (143, signal.SIGTERM),
        (241, signal.SIGTERM),
    ],
)
def test_a_status_tells_of_a_signal_in_three_ways(status: int, number: signal.Signals) -> None:
    assert signal_of(status) == number


@pytest.mark.parametrize("status", [0, 1, 2, 7, 120, 126, 127, 128, 255, 254])
def test_other_statuses_tell_of_none(status: int) -> None:
    assert signal_of(status) is None


@pytest.mark.parametrize("status", [-9, 137, 247])
def test_a_host_whose_launcher_tells_of_a_signal_has_lost_a_rank(status: int) -> None:
    ending = find_ending(Signs([1], {"a": 1, "b": status}))
    assert ending == Ending("lost_rank", "SIGKILL ended a rank on b", host="b")


def test_which_rank_was_killed_is_what_the_others_say() -> None:
    words = [of_another("lost_rank", "rank 3 on b: its process is gone")]
    ending = find_ending(Signs([247], {"b": 247}, words=words))
    assert (ending.cause, ending.rank, ending.host) == ("lost_rank", 3, "b")
    assert ending.message == "SIGKILL ended a rank on b (rank 3 on b: its process is gone)"


def test_of_several_hosts_that_tell_of_signals_the_one_of_the_missed_rank_counts() -> None:
    """A watchdog ends its own rank with SIGKILL where the interpreter does not come to an end."""
    words = [of_another("lost_rank", "rank 3 on b: its process is gone")]
    ending = find_ending(Signs([247, 247], {"a": 247, "b": 247}, words=words))
    assert (ending.rank, ending.host) == (3, "b")


def test_a_local_launcher_that_tells_of_a_signal_leaves_the_rest_to_the_others_words() -> None:
    words = [of_another("lost_rank", f"rank 1 on box: its process is gone{GOES_ON}", host="box")]
    ending = find_ending(Signs([247], words=words))
    assert ending == Ending("lost_rank", "rank 1 on box: its process is gone", 1, "box")


def test_a_lost_rank_without_a_word_is_lost_all_the_same() -> None:
    assert find_ending(Signs([247])) == Ending("lost_rank", "SIGKILL ended a rank")
    assert find_ending(Signs([-11])).message == "SIGSEGV ended a rank"


# --- without a word --------------------------------------------------------------------------------------------------


def test_status_2_without_a_word_is_the_users_mistake() -> None:
    ending = find_ending(Signs([2]))
    assert (ending.cause, ending.exit_status, ending.is_curable) == ("user_error", 2, False)


def test_any_other_status_without_a_word_is_a_fault() -> None:
    ending = find_ending(Signs([0, 7], {"a": 0, "b": 7}))
    assert ending == Ending("fault", "the launcher ended with status 7, and no rank said why", host="b")
    assert (ending.exit_status, ending.is_curable) == (1, True)


def test_a_message_that_names_no_rank_blames_none() -> None:
    ending = find_ending(Signs([1], words=[of_another("fault", "another rank failed")]))
    assert (ending.rank, ending.host) == (None, None)
