"""Whether another rank is still there: by its reports and by its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from dsllm.engine.peers import GONE_SECONDS, SILENT_SECONDS, Peer
from dsllm.engine.reports import Finding, Report

REPORT = Report(1, "host-b", beat=0, step=3, phase="backward")
LOOK_SECONDS = 0.5


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """Something that runs, as a rank on the same machine does."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def look_for(peer: Peer, report: Report, seconds: float) -> Finding | None:
    """What the last of the looks within `seconds` finds."""
    found = None
    for _ in range(round(seconds / LOOK_SECONDS)):
        found = peer.look(report, LOOK_SECONDS)
    return found


def test_a_rank_that_reports_is_there() -> None:
    peer = Peer(1, "host-b", None)
    for beat in range(100):
        assert peer.look(replace(REPORT, beat=beat), seconds=2.0) is None
    assert peer.is_there


def test_a_rank_without_a_new_report_is_silent_after_15_seconds() -> None:
    peer = Peer(1, "host-b", None)
    peer.look(REPORT, LOOK_SECONDS)
    assert look_for(peer, REPORT, SILENT_SECONDS - LOOK_SECONDS) is None
    expected = "rank 1 on host-b: not heard of for 15 s, last in step 3, backward"
    assert peer.look(REPORT, LOOK_SECONDS) == Finding("lost_host", expected, (1,))
    assert not peer.is_there


def test_a_rank_that_said_goodbye_is_not_missed(child: subprocess.Popen[bytes]) -> None:
    peer = Peer(1, "host-b", psutil.Process(child.pid))
    child.kill()
    assert look_for(peer, replace(REPORT, is_leaving=True), 2 * SILENT_SECONDS) is None


@pytest.mark.parametrize("is_waited_for", [True, False], ids=["gone", "zombie"])
def test_a_process_that_ended_is_missed_as_soon_as_its_last_words_would_have_come(
    child: subprocess.Popen[bytes], is_waited_for: bool
) -> None:
    peer = Peer(1, "host-b", psutil.Process(child.pid))
    assert peer.look(REPORT, LOOK_SECONDS) is None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | (0 if is_waited_for else os.WNOWAIT))
    assert look_for(peer, REPORT, GONE_SECONDS - LOOK_SECONDS) is None
    expected = "rank 1 on host-b: its process ended without a word, last in step 3, backward"
    assert peer.look(REPORT, LOOK_SECONDS) == Finding("lost_rank", expected, (1,))


def test_a_process_is_killed_only_where_it_is_silent_and_even_where_it_is_stopped(
    child: subprocess.Popen[bytes],
) -> None:
    process = psutil.Process(child.pid)
    peer = Peer(1, "host-b", process)
    child.send_signal(signal.SIGSTOP)
    peer.look(REPORT, LOOK_SECONDS)
    peer.kill_if_silent()
    assert child.poll() is None
    look_for(peer, REPORT, SILENT_SECONDS)
    peer.kill_if_silent()
    gone, _ = psutil.wait_procs([process], timeout=30)
    assert gone == [process]
