"""What a run is asked from outside."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsllm.engine.requests import Requests
from dsllm.engine.time_limit import TimeLimit

ROOT = Path(__file__).parents[1]

WAITS_FOR_SIGNALS = """
import logging, sys
from dsllm.engine.requests import Requests

logging.basicConfig(stream=sys.stdout, level="INFO", format="%(message)s")
requests = Requests()
try:
    print("ready", *requests.own(), flush=True)
    while sys.stdin.readline() != "end\\n":
        print(requests.reason, *requests.own(), flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_asks_for_the_end_after_the_step_and_says_so_once(number: signal.Signals) -> None:
    with waiting_process() as process:
        assert answer(process) == "ready 0.0 0.0"
        process.send_signal(number)
        assert answer(process) == f"{number.name}: finishing this step, then saving; Ctrl-C again ends at once"
        assert ask(process) == f"{number.name} 1.0 0.0"
        process.send_signal(signal.SIGTERM)  # what the launcher sends after a Ctrl-C
        assert ask(process) == f"{number.name} 1.0 0.0"
        assert process.communicate("end\n", timeout=30)[0] == ""
        assert process.returncode == 0


def test_sigusr1_asks_for_one_save_each_and_not_for_the_end() -> None:
    with waiting_process() as process:
        answer(process)
        for _ in range(2):
            process.send_signal(signal.SIGUSR1)
            assert answer(process) == "SIGUSR1: saving after this step, then going on"
            assert ask(process) == "a request to another rank 0.0 1.0"
            assert ask(process) == "a request to another rank 0.0 0.0"


def test_a_second_ctrl_c_ends_at_once() -> None:
    with waiting_process() as process:
        answer(process)
        process.send_signal(signal.SIGINT)
        assert answer(process).startswith("SIGINT: finishing this step")
        process.send_signal(signal.SIGINT)
        assert answer(process) == "interrupted"


def test_a_time_limit_that_is_reached_asks_for_the_end_and_is_the_reason() -> None:
    with own_handlers():
        requests = Requests(TimeLimit(started=0.0, stop_after_seconds=60.0))
    assert requests.own() == [1.0, 0.0]
    assert requests.reason == "--stop-after 1m00s"


def test_one_rank_that_is_asked_is_enough_and_a_save_is_agreed_for_one_step() -> None:
    with own_handlers():
        requests = Requests()
    assert (requests.stop, requests.take_save()) == (False, False)
    requests.agree(0.5, 0.25)
    assert (requests.stop, requests.take_save()) == (True, True)
    requests.agree(0.5, 0.0)
    assert (requests.stop, requests.take_save()) == (True, False)


@contextmanager
def waiting_process() -> Iterator[subprocess.Popen[str]]:
    """A process that answers each line with what it was asked."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS_FOR_SIGNALS], stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answer(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().rstrip("\n")


def ask(process: subprocess.Popen[str]) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return answer(process)


@contextmanager
def own_handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
