"""The harness keeps its promises: time limits hold, failures are shown, and nothing is left running."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.harness import RanksFailed, run_python_ranks, run_ranks

pytestmark = pytest.mark.distributed

HANG = """
import os, subprocess, sys, time

def wait_for_ever():
    time.sleep(600)

if os.environ["RANK"] == "1":
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    open(sys.argv[-1], "w").write(str(child.pid))
    wait_for_ever()
"""

FAIL = """
import os, sys
print("rank", os.environ["RANK"], "was here", file=sys.stderr)
sys.exit(3)
"""


def test_a_rank_that_hangs_is_killed_at_the_limit_with_its_children_and_named_with_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    started = time.monotonic()
    with pytest.raises(RanksFailed) as failure:
        run_ranks([tmp_path / "hang.py", tmp_path / "pid"], num_ranks=2, timeout_seconds=30)
    assert time.monotonic() - started < 60
    assert str(failure.value).startswith("still running after 30 s: rank 1\n")
    assert "in wait_for_ever" in str(failure.value)
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_rank_that_fails_shows_its_last_lines_and_the_status(tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(FAIL)
    with pytest.raises(RanksFailed, match=r"(?s)exit status 3\n.*--- rank 0\nrank 0 was here"):
        run_ranks([tmp_path / "fail.py"], num_ranks=1, timeout_seconds=120)


def test_what_a_function_returns_comes_back_in_the_order_of_the_ranks() -> None:
    results = run_python_ranks(
        Path(__file__), "who_am_i", {"greeting": "hello"}, num_ranks=2, timeout_seconds=120, env={"EXTRA": "set"}
    )
    assert results == [{"rank": str(rank), "world_size": "2", "greeting": "hello", "extra": "set"} for rank in range(2)]


def is_running(pid: int) -> bool:
    """A zombie has ended; it only waits for its parent to look."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def who_am_i(greeting: str) -> dict[str, str]:
    """Runs on the ranks."""
    environment = {"rank": os.environ["RANK"], "world_size": os.environ["WORLD_SIZE"], "extra": os.environ["EXTRA"]}
    return {"greeting": greeting, **environment}
