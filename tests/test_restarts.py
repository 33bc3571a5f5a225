"""A run that is started again: when, from where, on which hosts, and what its history says of it.

The supervisor and its agents are real; in the place of DeepSpeed and its ranks stands a script that records steps,
leaves last words and ends as a test wants, since real ranks need 15 s a start. tests/distributed/ has those.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsllm.errors import DsllmError, UserError
from dsllm.launch import launchers, restarts
from dsllm.launch.attempt import Outcome
from dsllm.launch.ending import Ending
from dsllm.launch.history import read_history
from dsllm.launch.hostfile import Host
from dsllm.launch.readiness import _used_hosts
from dsllm.launch.requests import Requests
from dsllm.launch.restarts import Patience, carry_through
from dsllm.launch.run_plan import RunPlan
from dsllm.launch.steps import steps_done
from dsllm.launch.topology import Topology
from dsllm.spec.load import load_spec

LOCAL = Topology((Host("localhost", 2),), is_local=True, on_cpu=True)
KILLED = "exit 247"


class Runs:
    """Carries a run through whose every attempt is a line of shell: the last one for all that follow."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.program = folder / "deepspeed"
        self.said: list[str] = []

    def carry(
        self, *attempts: str, max_restarts: int = 5, resume: str = "auto", stop_after_seconds: float | None = None
    ) -> Ending:
        lines = [
            "#!/bin/sh",
            f"cd {shlex.quote(str(self.run_dir.parent))}; mkdir -p run/logs run/checkpoints",
            'echo "$@" >> arguments',
            'step() { echo "{\\"step\\": $1}" >> run/metrics.jsonl; }',
            'finish() { echo "{\\"event\\": \\"finished\\", \\"step\\": 9}" >> run/history.jsonl; exit 0; }',
            "save() { echo global_step$1 > run/checkpoints/latest; }",
            'say() { echo "{\\"launch\\": \\"$DSLLM_LAUNCH\\", \\"time\\": 1.0, \\"rank\\": $2, \\"host\\": \\"here\\",'
            ' \\"cause\\": \\"$1\\", \\"message\\": \\"why\\", \\"is_own\\": true}" > run/logs/rank$2.ended.json; }',
            "case $(wc -l < arguments) in",
            *(f"{number}) {attempt};;" for number, attempt in enumerate(attempts[:-1], start=1)),
            f"*) {attempts[-1]};;",
            "esac",
        ]
        self.program.write_text("\n".join(lines) + "\n")
        self.program.chmod(0o755)
        plan = RunPlan(spec_name="quickstart", spec=load_spec("quickstart"), run_dir=self.run_dir)
        patience = Patience(max_restarts)
        return carry_through(plan, LOCAL, resume, stop_after_seconds, patience, say=self.said.append)

    @property
    def starts(self) -> list[str]:
        """The arguments of every attempt."""
        return (self.run_dir.parent / "arguments").read_text().splitlines()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_history(self.run_dir / "history.jsonl") if event["event"] == kind]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs(tmp_path)
    monkeypatch.setattr(launchers, "deepspeed_executable", lambda: str(made.program))
    monkeypatch.setattr(restarts, "FIRST_WAIT_SECONDS", 0.01)
    return made


# --- when ------------------------------------------------------------------------------------------------------------


def test_a_run_that_finishes_is_started_once(runs: Runs) -> None:
    assert runs.carry("step 1; step 2; finish").cause == "finished"
    assert len(runs.starts) == 1
    (launched,), (ended,) = runs.events("launched"), runs.events("ended")
    assert (launched["step"], launched["launcher"], launched["hosts"]) == (0, "local", ["localhost"])
    assert launched["world_size"] == 2
    assert (ended["step"], ended["cause"], ended["rank"]) == (2, "finished", None)


def test_a_killed_rank_is_a_reason_to_start_again(runs: Runs) -> None:
    assert runs.carry(f"step 1; {KILLED}", "step 2; finish", max_restarts=1).cause == "finished"
    assert [event["cause"] for event in runs.events("ended")] == ["lost_rank", "finished"]
    assert [event["step"] for event in runs.events("launched")] == [0, 1]
    assert [line for line in runs.said if "starting again" in line] == (
        ["ended by lost_rank: SIGKILL ended a rank; starting again in 0.0s, restart 1 of 1"]
    )


def test_no_restart_is_made_unless_it_is_asked_for(runs: Runs) -> None:
    assert runs.carry(KILLED, max_restarts=0).cause == "lost_rank"
    assert len(runs.starts) == 1


@pytest.mark.parametrize("cause", ["user_error", "out_of_memory", "non_finite", "disk"])
def test_what_would_come_again_is_not_tried_again(runs: Runs, cause: str) -> None:
    ending = runs.carry(f"step 1; say {cause} 0; exit 1")
    assert (ending.cause, ending.rank, len(runs.starts)) == (cause, 0, 1)


@pytest.mark.parametrize("cause", ["lost_host", "lost_rank", "communication", "hang", "fault"])
def test_what_may_not_come_again_is_tried_again(runs: Runs, cause: str) -> None:
    assert runs.carry(f"step 1; say {cause} 1; exit 1", "step 2; finish").cause == "finished"
    assert runs.events("ended")[0]["cause"] == cause
    assert (runs.events("ended")[0]["rank"], runs.events("ended")[0]["host"]) == (1, "here")


def test_what_ends_the_run_twice_at_one_step_in_one_way_is_not_tried_a_third_time(runs: Runs) -> None:
    assert runs.carry(f"step 3; {KILLED}").cause == "lost_rank"
    assert len(runs.starts) == 2


def test_what_ends_the_run_before_its_first_step_is_not_tried_a_third_time(runs: Runs) -> None:
    assert runs.carry("exit 1").cause == "fault"
    assert len(runs.starts) == 2


def test_as_long_as_there_are_more_steps_it_is_tried_as_often_as_allowed(runs: Runs) -> None:
    attempts = [f"step {number}; {KILLED}" for number in range(1, 9)]
    assert runs.carry(*attempts, max_restarts=3).cause == "lost_rank"
    assert len(runs.starts) == 4


def test_another_end_at_the_same_step_is_another_matter(runs: Runs) -> None:
    ends = [KILLED, "say hang 1; exit 1", KILLED, "finish"]
    assert runs.carry(*ends).cause == "finished"
    assert len(runs.starts) == 4


def test_waits_double_up_to_five_minutes(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_WAIT_SECONDS", 5.0)
    waited: list[float] = []
    monkeypatch.setattr(Requests, "wait", lambda requests, seconds: waited.append(seconds))
    attempts = [f"step {number}; {KILLED}" for number in range(1, 10)]
    runs.carry(*attempts, max_restarts=8)
    assert waited == [5, 10, 20, 40, 80, 160, 300, 300]


def test_the_end_of_the_log_of_the_rank_that_failed_first_is_shown(runs: Runs) -> None:
    runs.carry("echo its last line > run/logs/rank1.log; say fault 1; exit 1", max_restarts=0)
    assert runs.said[-2:] == [
        f"rank 1 on here failed first; the end of {runs.run_dir}/logs/rank1.log:",
        "  its last line",
    ]


def test_what_an_earlier_attempt_left_is_no_word_of_this_one(runs: Runs) -> None:
    ending = runs.carry("step 1; say hang 1; exit 1", "step 2; exit 7", max_restarts=1)
    assert ending.cause == "fault"


# --- from where ------------------------------------------------------------------------------------------------------


def test_after_resume_never_a_restart_goes_on_from_the_runs_own_checkpoint(runs: Runs) -> None:
    runs.carry(f"step 1; save 1; {KILLED}", "step 2; finish", resume="never")
    assert ["--resume never" in start for start in runs.starts] == [True, False]


def test_another_runs_checkpoint_is_where_to_start_until_there_is_one_of_its_own(runs: Runs, tmp_path: Path) -> None:
    runs.carry("step 1; exit 1", "step 2; save 2; exit 1", "finish", resume=str(tmp_path))
    assert [f"--resume {tmp_path}" in start for start in runs.starts] == [True, True, False]


def test_a_time_limit_counts_from_the_first_start(runs: Runs) -> None:
    runs.carry("step 1; sleep 1.2; exit 1", "finish", stop_after_seconds=100)
    seconds = [int(start.split("--stop-after ")[1].split("s")[0]) for start in runs.starts]
    assert seconds[0] == 100
    assert 90 <= seconds[1] < 100


def test_a_time_limit_that_is_over_still_lets_a_run_save(monkeypatch: pytest.MonkeyPatch) -> None:
    assert restarts._time_left(10.0, started=-1e9) == "1s"
    assert restarts._time_left(None, started=0.0) is None


@pytest.mark.parametrize(
    ("content", "steps"),
    [
        ("", 0),
        ('{"step": 1}\n', 1),
        ('{"step": 1}\n{"step": 2}\n', 2),
        ('{"step": 1}\n{"step": 2}\n{"st', 2),
        ('{"step": 1}\n{"step": 2', 1),
        ('{"st', 0),
        ('{"step": 3}\nnull\n', 3),
    ],
)
def test_steps_done_are_what_is_recorded_whole(tmp_path: Path, content: str, steps: int) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    assert steps_done(tmp_path) == steps


def test_a_run_without_records_has_done_no_step(tmp_path: Path) -> None:
    assert steps_done(tmp_path / "nothing") == 0


# --- on which hosts --------------------------------------------------------------------------------------------------


def hosts_left(ready: list[str], min_hosts: int | None, *settings: str) -> list[str]:
    """With what a doctor might have found in place of the real one, which needs the hosts."""
    hosts = tuple(Host(name, 2) for name in "abcd")
    finding = SimpleNamespace(found="on fire", remedy="water")
    report = SimpleNamespace(
        against=lambda asks_doctor: {host.name: [finding] for host in hosts if host.name not in ready}
    )
    sizes = ["batch.global_batch_size=48", "batch.micro_batch_size=2", *settings]
    plan = RunPlan(spec_name="quickstart", spec=load_spec("quickstart", sizes), run_dir=Path("run"), launcher="ssh")
    topology = Topology(hosts, hostfile="hosts", listed=hosts)
    left = _used_hosts(plan, topology, report, min_hosts)  # type: ignore[arg-type]
    assert left.listed == hosts, "pdsh names those that are left"
    return left.names


def test_all_hosts_that_are_ready_are_used_in_their_order() -> None:
    assert hosts_left(["d", "c", "b", "a"], None) == ["a", "b", "c", "d"]
    assert hosts_left(["a", "c", "d"], 2) == ["a", "c", "d"]


def test_as_many_are_used_as_the_batch_divides_over() -> None:
    """32 sequences on 3 hosts of 2 ranks, 2 sequences each at a time: 12 do not divide 32, 8 do."""
    assert hosts_left(["a", "c", "d"], 1, "batch.global_batch_size=32") == ["a", "c"]


def test_where_fewer_are_ready_than_the_run_may_start_with_it_says_what_is_wrong_with_the_others() -> None:
    remedy = "dsllm doctor says more, --no-doctor starts all the same where that is possible"
    with pytest.raises(DsllmError) as refusal:
        hosts_left(["a", "c", "d"], None)
    assert str(refusal.value) == f"b: on fire; water; {remedy}"
    with pytest.raises(DsllmError) as refusal:
        hosts_left(["a"], 2)
    found = "b: on fire; water; c: on fire; water; d: on fire; water"
    assert str(refusal.value) == f"1 hosts are ready, --min-hosts 2: {found}; {remedy}"


def test_hosts_that_the_batch_divides_over_in_no_number_are_refused_as_such() -> None:
    with pytest.raises(DsllmError, match="the global batch does not divide over any number of hosts from there on"):
        hosts_left(["a", "b", "c", "d"], 3, "batch.global_batch_size=20")


def test_hosts_that_are_not_ready_at_a_restart_are_one_more_failed_attempt_however_often(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may come back. The attempt itself is made up: a host cannot be lost on this machine alone."""
    ends = iter([Ending("hang", ""), None, None, Ending("finished", "")])

    def attempt(*arguments: Any, **options: Any) -> Outcome:
        ending = next(ends)
        if ending is None:
            raise DsllmError("b: cannot be asked")
        return Outcome(ending)

    monkeypatch.setattr(restarts, "attempt", attempt)
    assert runs.carry("exit 1", max_restarts=3).cause == "finished"
    assert [event["cause"] for event in runs.events("ended")] == ["hang", "lost_host", "lost_host", "finished"]
    assert runs.events("ended")[1]["message"] == "b: cannot be asked"


@pytest.mark.parametrize("kind", [DsllmError, UserError])
def test_hosts_that_are_not_ready_at_the_first_start_end_it(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, kind: type[DsllmError]
) -> None:
    def attempt(*arguments: Any, **options: Any) -> Outcome:
        raise kind("b: cannot be asked")

    monkeypatch.setattr(restarts, "attempt", attempt)
    with pytest.raises(kind, match="b: cannot be asked"):
        runs.carry("exit 1")


# --- requests between attempts ---------------------------------------------------------------------------------------


def test_a_signal_that_comes_between_two_attempts_is_not_lost(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_WAIT_SECONDS", 60.0)

    def say(line: str) -> None:
        if "starting again" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs, "said", SimpleNamespace(append=say))
    started = time.monotonic()
    ending = runs.carry(f"step 1; {KILLED}")
    assert ending == Ending("interrupted", "SIGTERM came before it started again")
    assert (ending.exit_status, len(runs.starts)) == (1, 1)
    assert time.monotonic() - started < 30


def test_what_fails_after_somebody_asked_for_the_end_is_not_started_again(runs: Runs) -> None:
    rank = "RANK=0 sh -c 'trap \"\" TERM; sleep 3' & sleep 0.2"
    ending = runs.carry(f"{rank}; kill -TERM {os.getpid()}; sleep 0.5; step 1; say hang 1; exit 1")
    assert (ending.cause, ending.was_asked, len(runs.starts)) == ("hang", True, 1)
