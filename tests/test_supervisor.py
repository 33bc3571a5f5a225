"""How the ranks of an attempt are watched: starts are lines of shell on this machine, the agents are real."""

from __future__ import annotations

import io
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsllm.errors import UserError
from dsllm.launch import agent, supervisor
from dsllm.launch.hosts import Hosts, on_this_machine
from dsllm.launch.launchers import Start
from dsllm.launch.requests import Requests
from dsllm.launch.supervisor import Screen, Watched, watch_ranks


@pytest.fixture
def launch() -> Iterator[str]:
    launch = secrets.token_hex(8)
    yield launch
    agent.sweep(launch)


class Attempt:
    """Two hosts, which are both this machine."""

    def __init__(self, launch: str, folder: Path) -> None:
        self.launch = launch
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.out, self.err = io.StringIO(), io.StringIO()
        self.hosts = Hosts(["a", "b"], on_this_machine, folder)
        self.hosts.ask_all("guard", launch=launch)

    def start(self, line: str, host: str | None = None, **options: Any) -> Start:
        return Start(["sh", "-c", line], {"DSLLM_LAUNCH": self.launch}, host=host, **options)

    def watch(self, *starts: Start) -> Watched:
        with Requests() as requests:
            return watch_ranks(starts, self.hosts, self.launch, str(self.logs), requests, Screen(self.out, self.err))


@pytest.fixture
def attempt(launch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempt]:
    monkeypatch.setattr(supervisor, "ENDING_SECONDS", 1.0)
    made = Attempt(launch, tmp_path)
    yield made
    made.hosts.close()


# --- ends ------------------------------------------------------------------------------------------------------------


def test_starts_that_end_well_leave_no_sign(attempt: Attempt) -> None:
    signs, left, not_swept = attempt.watch(attempt.start("exit 0", "a"), attempt.start("exit 0", "b"))
    assert (signs.statuses, signs.exits, signs.lost, signs.words) == ([0, 0], {}, [], [])
    assert (left, not_swept) == ({}, [])


def test_every_host_has_its_own_status(attempt: Attempt) -> None:
    signs, _, _ = attempt.watch(attempt.start("exit 3", "a"), attempt.start("kill -9 $$", "b"))
    assert signs.exits == {"a": 3, "b": -9}


def test_after_one_failed_the_others_have_their_time_and_their_end_is_no_sign(attempt: Attempt) -> None:
    started = time.monotonic()
    signs, left, _ = attempt.watch(attempt.start("sleep 600; true", "a"), attempt.start("exit 247", "b"))
    assert 1 <= time.monotonic() - started < 15
    assert signs.exits == {"b": 247}, "a was ended by the supervisor"
    assert [line for lines in left.values() for line in lines if "sleep" in line]


def test_what_outlives_its_start_is_ended_and_named(attempt: Attempt, launch: str) -> None:
    _, left, _ = attempt.watch(attempt.start("setsid sleep 600 & sleep 0.5", "a"))
    assert {line for lines in left.values() for line in lines} == {"sleep 600"}
    assert agent.processes_of(launch) == {}


def test_a_lost_host_is_a_sign_with_its_own_words(attempt: Attempt) -> None:
    threading.Timer(0.5, attempt.hosts.agents["b"]._process.kill).start()
    signs, _, not_swept = attempt.watch(attempt.start("sleep 600", "a"))
    assert [str(error) for error in signs.lost] == ["b: ended with status -9"]
    assert [error.host for error in not_swept] == ["b"]


def test_last_words_are_collected_once_and_own_ones_come_first(attempt: Attempt, launch: str) -> None:
    for rank, is_own in ((0, False), (1, True)):
        word = {"launch": launch, "rank": rank, "time": float(rank), "is_own": is_own}
        (attempt.logs / f"rank{rank}.ended.json").write_text(json.dumps(word))
    signs, _, _ = attempt.watch(attempt.start("exit 1", "a"))
    assert [word["rank"] for word in signs.words] == [1, 0]


def test_a_program_that_is_not_installed_ends_what_was_started_before(attempt: Attempt, launch: str) -> None:
    missing = Start(["no-such-launcher"], host="b")
    with pytest.raises(UserError, match="no-such-launcher: not installed; install it "):
        attempt.watch(attempt.start("sleep 600", "a"), missing)
    assert agent.processes_of(launch) == {}


# --- the environment -------------------------------------------------------------------------------------------------


def test_a_start_has_this_processs_environment_without_a_ranks_and_what_it_must_not_have(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "NCCL_DEBUG", "PYTHONSAFEPATH", "RANK_OF_MINE"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("PYTHONPATH", "x")
    attempt.watch(attempt.start("env", "a", without=("NCCL", "PYTHON")))
    names = {line.partition("=")[0] for line in attempt.out.getvalue().splitlines()}
    assert {"DSLLM_LAUNCH", "PATH", "RANK_OF_MINE"} <= names
    assert "PYTHONPATH" in names, "the launcher has to find its packages itself"
    assert not names & {"RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "NCCL_DEBUG", "PYTHONSAFEPATH"}


# --- what ranks print ------------------------------------------------------------------------------------------------


def test_lines_of_the_first_host_are_as_they_are_and_others_have_its_name(attempt: Attempt) -> None:
    attempt.watch(attempt.start("echo one; echo two >&2", "a"), attempt.start("echo one; echo two >&2", "b"))
    assert sorted(attempt.out.getvalue().splitlines()) == ["b: one", "one"]
    assert sorted(attempt.err.getvalue().splitlines()) == ["b: two", "two"]


def test_labels_of_pdsh_are_taken_off_the_first_host(attempt: Attempt) -> None:
    attempt.watch(attempt.start("echo 'a: one: two'; echo 'b: three'; echo 'no label'", is_labelled=True))
    assert attempt.out.getvalue().splitlines() == ["one: two", "b: three", "no label"]


def test_statuses_that_pdsh_tells_are_signs_and_not_shown(attempt: Attempt) -> None:
    line = "echo 'pdsh@here: b: ssh exited with exit code 255' >&2; echo else >&2; exit 1"
    signs, _, _ = attempt.watch(attempt.start(line, is_labelled=True))
    assert signs.exits == {"b": 255}
    assert attempt.err.getvalue() == "else\n"


def test_output_that_is_no_text_is_shown_all_the_same(attempt: Attempt) -> None:
    attempt.watch(attempt.start("printf '\\377\\n'", "a"))
    assert attempt.out.getvalue() == "\ufffd\n"


def test_a_screen_that_is_gone_does_not_end_the_run(attempt: Attempt) -> None:
    attempt.out.close()
    signs, _, _ = attempt.watch(attempt.start("for i in 1 2 3; do echo $i; sleep 0.1; done", "a"))
    assert signs.statuses == [0]


# --- signals ---------------------------------------------------------------------------------------------------------

SAVES = "RANK=0 exec sh -c 'trap \"echo saved; exit 0\" TERM; echo ready; while :; do sleep 0.05; done'"


def send_when_ready(attempt: Attempt, *numbers: signal.Signals) -> None:
    """To this process, which watches."""

    def wait_and_send() -> None:
        while "ready" not in attempt.out.getvalue():
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    threading.Thread(target=wait_and_send).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_stop_reaches_the_ranks_and_is_a_sign(attempt: Attempt, number: signal.Signals) -> None:
    """Of a closed terminal ranks hear as SIGTERM."""
    before = signal.getsignal(number)
    send_when_ready(attempt, number)
    signs, _, _ = attempt.watch(attempt.start(SAVES, "a"))
    assert (signs.asked_by, signs.statuses) == (number.name, [0])
    assert "saved" in attempt.out.getvalue()
    assert signal.getsignal(number) == before


def test_a_signal_to_save_reaches_the_ranks_and_is_none_to_stop(attempt: Attempt) -> None:
    rank = (
        "import signal, time; said = []\n"
        "signal.signal(signal.SIGUSR1, lambda *_: said.append(1))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1}); print('ready', flush=True)\n"
        "while not said: time.sleep(0.02)\n"
        "time.sleep(0.5); print('saved')"  # both agents send it, and Python's end would find the second
    )
    send_when_ready(attempt, signal.SIGUSR1)
    start = Start([sys.executable, "-c", rank], {"DSLLM_LAUNCH": attempt.launch}, host="a")
    signs, _, _ = attempt.watch(Start(["env", "RANK=0", *start.command], start.environment, host="a"))
    assert (signs.asked_by, signs.statuses) == (None, [0])
    assert "saved" in attempt.out.getvalue()


def test_where_no_rank_runs_yet_a_signal_to_stop_ends_the_attempt(attempt: Attempt) -> None:
    started = time.monotonic()
    send_when_ready(attempt, signal.SIGTERM)
    signs, _, _ = attempt.watch(attempt.start("echo ready; sleep 600", "a"))
    assert time.monotonic() - started < 10
    assert signs.asked_by == "SIGTERM"


@pytest.mark.parametrize(
    ("sent", "handed_on", "asked_by"),
    [(signal.SIGTERM, signal.SIGUSR2, "SIGTERM"), (signal.SIGUSR1, signal.SIGUSR1, None)],
)
def test_where_no_agent_sees_the_ranks_their_launcher_hands_the_request_on(
    attempt: Attempt, sent: signal.Signals, handed_on: signal.Signals, asked_by: str | None
) -> None:
    """As srun does, where Slurm alone is asked: SIGUSR2 stands for every other signal to stop."""
    srun = (
        "import signal, time\n"
        "def stop(*_): print('handed on', flush=True); raise SystemExit\n"
        f"signal.signal({int(handed_on)}, stop)\n"
        f"signal.pthread_sigmask(signal.SIG_UNBLOCK, {{{int(handed_on)}}}); print('ready', flush=True); time.sleep(60)"
    )
    send_when_ready(attempt, sent)
    start = Start([sys.executable, "-c", srun], {"DSLLM_LAUNCH": attempt.launch}, host="a", hands_signals_on=True)
    signs, _, _ = attempt.watch(start)
    assert (signs.asked_by, signs.statuses) == (asked_by, [0])
    assert "handed on" in attempt.out.getvalue()
