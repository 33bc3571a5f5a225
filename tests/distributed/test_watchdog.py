"""One rank hangs, dies or fails alone: the run ends on every rank, soon, non-zero, and says which rank it was."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsllm.engine.peers import SILENT_SECONDS
from tests.distributed.harness import ROOT, RankResult, run_launch, run_python_ranks, run_ranks
from tests.distributed.test_resume import arguments, ranks_of, records
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

HANG_SECONDS = 4
ENDS_WITHIN_SECONDS = 30
"""Of its limit."""
GO_ON = "the same command goes on from the last checkpoint"
FP32 = "training={train_steps: 12, precision: fp32}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


def train_with_fault(corpus: Path, run: Path, fault: str, rank: int, num_ranks: int = 2) -> tuple[RankResult, float]:
    """How a run ended whose `rank` met `fault` in step 3, and how many seconds after its second step."""
    flags = arguments(
        corpus, run, 2, FP32, f"guards.hang_seconds={HANG_SECONDS}", f"batch.global_batch_size={4 * num_ranks}"
    )
    script = [ROOT / "tests/distributed/faulty_rank.py", fault, str(rank), *flags]
    result = run_ranks(script, num_ranks=num_ranks, timeout_seconds=180, check=False)
    return result, time.time() - (run / "metrics.jsonl").stat().st_mtime


def log_of(run: Path, rank: int) -> str:
    return (run / "logs" / f"rank{rank}.log").read_text()


def last_entry(run: Path, rank: int) -> str:
    """The message of the log's last entry; lines of stacks are none."""
    return re.findall(r"^\S+ \S+ (?:ERROR|CRITICAL) [\w.]+: (.*)", log_of(run, rank), re.MULTILINE)[-1]


def words_of(run: Path, rank: int) -> dict[str, Any] | None:
    """What a rank has left to be read by programs; a process that is killed leaves nothing."""
    path = run / "logs" / f"rank{rank}.ended.json"
    return json.loads(path.read_text()) if path.is_file() else None


def check_words(run: Path, rank: int, cause: str, *, is_own: bool) -> None:
    """The same as its log's last entry, or as its error."""
    words = words_of(run, rank)
    assert words is not None
    assert (words["cause"], words["is_own"], words["exit_status"]) == (cause, is_own, 1)
    assert words["rank"] == rank


def check_end(result: RankResult, seconds: float, limit_seconds: float) -> None:
    """Non-zero, in time, and nothing is left."""
    assert result.returncode != 0
    assert seconds < limit_seconds + ENDS_WITHIN_SECONDS
    assert result.left_behind == ()


def test_a_rank_that_sleeps_for_ever_is_named_and_every_rank_leaves_its_stacks(corpus: Path, tmp_path: Path) -> None:
    result, seconds = train_with_fault(corpus, tmp_path / "run", "sleeps", 1)
    check_end(result, seconds, HANG_SECONDS)
    named = re.compile(r"rank 1 on \S+: no progress for \d\.\ds, in step 3, reading; the other ranks wait; " + GO_ON)
    assert named.search(result.rank_outputs[0])
    for rank in (0, 1):
        assert named.match(last_entry(tmp_path / "run", rank))
        check_words(tmp_path / "run", rank, "hang", is_own=rank == 1)
        assert named.match(words_of(tmp_path / "run", rank)["message"])
    assert re.search(r"distributed_c10d.py.*\n(.*\n)*.*in train_step", log_of(tmp_path / "run", 0))
    assert re.search(r"faulty_rank.py.*\n(.*\n)*.*in train_step", log_of(tmp_path / "run", 1))


def test_a_rank_that_exits_without_a_word_is_named_by_the_other(corpus: Path, tmp_path: Path) -> None:
    result, seconds = train_with_fault(corpus, tmp_path / "run", "exits", 1)
    check_end(result, seconds, 0)
    named = re.compile(r"rank 1 on \S+: its process ended without a word, last in .*; " + GO_ON)
    assert named.match(last_entry(tmp_path / "run", 0))
    assert named.search(result.rank_outputs[0])
    check_words(tmp_path / "run", 0, "lost_rank", is_own=False)
    assert words_of(tmp_path / "run", 1) is None


def test_where_rank_0_is_killed_and_the_store_with_it_the_others_say_so(corpus: Path, tmp_path: Path) -> None:
    result, seconds = train_with_fault(corpus, tmp_path / "run", "is killed", 0, num_ranks=3)
    check_end(result, seconds, 0)
    for rank in (1, 2):
        assert "rank 0 on " in result.rank_outputs[rank]
        assert "its process ended without a word" in last_entry(tmp_path / "run", rank)
        check_words(tmp_path / "run", rank, "lost_rank", is_own=False)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_not_heard_of_and_does_not_stay_behind(corpus: Path, tmp_path: Path, rank: int) -> None:
    result, seconds = train_with_fault(corpus, tmp_path / "run", "is stopped", rank)
    check_end(result, seconds, SILENT_SECONDS)
    assert f"rank {rank} on " in result.rank_outputs[1 - rank]
    assert "not heard of for 15 s" in last_entry(tmp_path / "run", 1 - rank)
    check_words(tmp_path / "run", 1 - rank, "lost_host", is_own=False)


@pytest.mark.slow
def test_a_rank_whose_interpreter_is_locked_still_leaves_its_stacks(corpus: Path, tmp_path: Path) -> None:
    result, seconds = train_with_fault(corpus, tmp_path / "run", "locks", 1)
    check_end(result, seconds, SILENT_SECONDS)
    assert "not heard of for 15 s" in last_entry(tmp_path / "run", 0)
    assert "in lock_the_interpreter" in log_of(tmp_path / "run", 1)


def test_what_one_rank_raises_alone_is_what_the_others_end_with(corpus: Path, tmp_path: Path) -> None:
    result, seconds = train_with_fault(corpus, tmp_path / "run", "raises", 1)
    check_end(result, seconds, 0)
    assert "ValueError: this rank has had enough (more in " in result.rank_outputs[1]
    last_line = result.rank_outputs[0].strip().splitlines()[-1]
    assert re.match(r"rank 1 on \S+: ValueError: this rank has had enough; " + GO_ON, last_line)
    assert "in read_faulty" in log_of(tmp_path / "run", 1)
    for rank in (0, 1):
        check_words(tmp_path / "run", rank, "fault", is_own=rank == 1)
    assert words_of(tmp_path / "run", 1)["message"] == "ValueError: this rank has had enough"


def test_a_launch_saves_at_sigusr1_goes_on_and_ends_when_a_rank_is_killed(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = arguments(corpus, run, 2, "training={train_steps: 100000, precision: fp32}", "checkpoint.interval=100000")
    results: list[RankResult] = []
    launch = threading.Thread(
        target=lambda: results.append(run_launch(flags, num_ranks=2, timeout_seconds=180, check=False))
    )
    launch.start()
    latest = run / "checkpoints" / "latest"
    wait_until(lambda: len(records(run)) >= 3, launch)
    supervisor_of(run).send_signal(signal.SIGUSR1)
    wait_until(latest.is_file, launch)
    saved = int(latest.read_text().removeprefix("global_step"))
    wait_until(lambda: len(records(run)) > saved, launch)
    (victim,) = (process for process in ranks_of(run) if process.environ()["RANK"] == "1")
    killed = time.monotonic()
    victim.kill()
    launch.join()
    check_end(results[0], time.monotonic() - killed, 0)
    assert "its process ended without a word" in last_entry(run, 0)
    assert "SIGUSR1: saving after this step, then going on" in results[0].launcher_output
    assert re.search(r"rank 1 on \S+: its process ended without a word", results[0].launcher_output)


def test_a_run_stops_after_its_time_saves_and_goes_on_with_the_same_command(corpus: Path, tmp_path: Path) -> None:
    flags = [*arguments(corpus, tmp_path / "run", 2, FP32), "--stop-after", "1s"]
    told = run_python_ranks(
        Path(__file__).with_name("attempts.py"),
        "attempt_each",
        {"runs": [[*flags[:-1], "soon"], flags, flags[:-2]]},
        num_ranks=2,
        timeout_seconds=120,
    )[0]
    refused, stopped, finished = (end["stderr"].strip().splitlines()[-1] for end in told)
    assert [end["status"] for end in told] == [2, 0, 0]
    assert refused == "--stop-after: given 'soon'; must be a time such as 90s, 45m, 3h50m or 1d2h"
    done = int(re.match(r"stopped by --stop-after 1.0s after step (\d+) of 12; saved: the same command", stopped)[1])
    assert 1 <= done < 12
    assert "trained to step 12 of 12" in finished
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, 13))


def wait_until(is_so: Callable[[], bool], launch: threading.Thread) -> None:
    """While the launch runs, which has a time limit."""
    while not is_so():
        assert launch.is_alive()
        time.sleep(0.05)


def supervisor_of(run: Path) -> psutil.Process:
    """The `dsllm launch` of a run."""
    (process,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if {str(run), "dsllm.cli.app"} <= set(process.info["cmdline"] or [])
    )
    return process
