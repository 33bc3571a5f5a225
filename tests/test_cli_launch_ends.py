"""How `dsllm launch` and `dsllm check` hand signals on and end, with a script in DeepSpeed's place."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from dsllm.cli.launch import conclude
from dsllm.errors import DsllmError, UserError
from dsllm.launch.agent import is_zombie
from dsllm.launch.ending import Ending
from tests.test_cli import ROOT, run

pytestmark = pytest.mark.usefixtures("plain_surroundings")


# --- how a launch ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["finished", "stopped"])
def test_a_good_end_says_nothing_more(cause: str) -> None:
    conclude(Ending(cause, "all steps are done"))


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (Ending("out_of_memory", "why", 0, "a"), 1),
        (Ending("user_error", "why", 0, "a"), 2),
        (Ending("user_error", "the ranks said why"), 2),
    ],
)
def test_what_rank_0_has_said_on_screen_is_not_said_again(ending: Ending, status: int) -> None:
    with pytest.raises(typer.Exit) as end:
        conclude(ending)
    assert end.value.exit_code == status


@pytest.mark.parametrize(
    ("ending", "kind", "message"),
    [
        (
            Ending("lost_rank", "rank 0 on a: gone", 0, "a"),
            DsllmError,
            "ended by lost_rank on a: rank 0 on a: gone; ADVICE",
        ),
        (
            Ending("hang", "rank 1 on b: no progress", 1, "b"),
            DsllmError,
            "ended by hang on b: rank 1 on b: no progress; ADVICE",
        ),
        (Ending("user_error", "no such file", 1, "b"), UserError, "ended by user_error on b: no such file"),
        (Ending("fault", "ended with status 7"), DsllmError, "ended by fault: ended with status 7; ADVICE"),
    ],
)
def test_what_nobody_has_said_on_screen_is_said(ending: Ending, kind: type[DsllmError], message: str) -> None:
    with pytest.raises(kind) as fault:
        conclude(ending, goes_on="ADVICE")
    assert str(fault.value) == message
    assert fault.value.exit_code == ending.exit_status


# --- a launcher of the test in DeepSpeed's place ---------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """Whoever runs the tests in the background, or under nohup, has them ignored, and so would what a test starts."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    """A Python environment's folder whose `deepspeed` is a script of the test."""
    (tmp_path / "python").symlink_to(sys.executable)
    return tmp_path / "deepspeed"


def launch_with(launcher: Path, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    launcher.write_text(f"#!/bin/sh\n{script}\n")
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    given = list(arguments or ("launch", "quickstart", "--run-dir", str(launcher.parent / "run")))
    program = (
        f"import sys; sys.executable = {str(launcher.parent / 'python')!r}\n"
        "from dsllm.cli.app import main\n"
        f"sys.argv = ['dsllm', *{given!r}]\n"
        "main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "HISTORY": str(launcher.parent / "run" / "history.jsonl"), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lines_until_ready(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    while "ready" not in lines:
        assert process.poll() is None
        lines.append(process.stdout.readline().strip())
    return lines


def rank_in_shell(script: str) -> str:
    """A launcher whose only rank is this script, and whose status is the rank's. `note EVENT` is for its history."""
    note = 'note() { echo "{\\"event\\": \\"$1\\", \\"step\\": 1, \\"by\\": \\"a signal\\"}" >> $HISTORY; }'
    script = f"{note}\n{script}"
    return f"RANK=0 sh -c {shlex.quote(script)}; exit $?"


SAVES = "trap 'echo saved; note stopped; exit 0' TERM INT; echo ready; while :; do sleep 0.05; done"


def test_a_launch_hands_sigusr1_and_sigusr2_on_to_the_ranks_and_no_launcher_dies_of_them(launcher: Path) -> None:
    rank = (
        "import signal, sys, time\n"
        "said = []\n"
        "for name in ('SIGUSR1', 'SIGUSR2'):\n"
        "    number = getattr(signal, name)\n"
        "    print(signal.getsignal(number) == signal.SIG_IGN, flush=True)\n"
        "    signal.signal(number, lambda number, frame: said.append(number))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGUSR2})\n"
        "print('ready', flush=True)\n"
        "while len(said) < 2: time.sleep(0.05)\n"
        "print(*map(int, said), flush=True)\n"
        "import os; open(os.environ['HISTORY'], 'a').write('{\"event\": \"finished\"}\\n')\n"
    )
    (launcher.parent / "rank.py").write_text(rank)
    process = launch_with(launcher, f"RANK=0 {launcher.parent}/python {launcher.parent}/rank.py; exit $?")
    assert lines_until_ready(process)[-3:-1] == ["True", "True"], "until a rank answers them, they are ignored"
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
        time.sleep(0.5)  # two pending signals have no order
    assert process.stdout is not None
    assert process.stdout.read().strip() == f"{signal.SIGUSR1:d} {signal.SIGUSR2:d}"
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_launch_hands_on_the_signal_and_waits_for_the_run_to_end(launcher: Path, number: signal.Signals) -> None:
    process = launch_with(launcher, rank_in_shell(SAVES))
    lines_until_ready(process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.stdout is not None
    assert "saved" in process.stdout.read()
    assert process.wait(timeout=60) == 0


def test_inside_a_shell_of_slurm_the_signal_goes_to_the_ranks_all_the_same(launcher: Path) -> None:
    """`srun --pty bash` has the variables of rank 0; DeepSpeed's launcher must not be taken for it."""
    process = launch_with(launcher, rank_in_shell(SAVES), SLURM_PROCID="0", SLURM_STEP_ID="0", RANK="0")
    lines_until_ready(process)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert "saved" in process.stdout.read()
    assert process.wait(timeout=60) == 0


def test_a_second_ctrl_c_reaches_the_ranks_too(launcher: Path) -> None:
    """The ranks make of it what they like: to them it means to end at once."""
    script = "trap 'echo first; trap \"echo second; note stopped; exit 0\" INT' INT; echo ready; "
    process = launch_with(launcher, rank_in_shell(script + "while :; do sleep 0.05; done"))
    lines_until_ready(process)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "first":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "second" in process.stdout.read()
    assert process.wait(timeout=60) == 0


def test_under_nohup_a_closed_terminal_ends_nothing(launcher: Path) -> None:
    script = "trap 'echo hung up; exit 0' HUP; echo ready; i=0; while [ $i -lt 20 ]; do sleep 0.05; i=$((i+1)); done"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = launch_with(launcher, rank_in_shell(script + "; note finished; echo finished"))
    finally:
        signal.signal(signal.SIGHUP, before)
    lines_until_ready(process)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=60)
    assert (out.strip(), process.returncode) == ("finished", 0)


def test_a_signal_before_there_is_a_rank_ends_the_launch_at_once(launcher: Path) -> None:
    process = launch_with(launcher, "echo ready; sleep 600")
    lines_until_ready(process)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, "nothing was saved"
    assert "dsllm: ended by interrupted: SIGTERM ended it before the ranks could save" in err
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(("status", "expected"), [(7, 1), (2, 2), (0, 1)])
def test_a_launch_ends_with_2_for_a_mistake_and_1_for_a_fault(launcher: Path, status: int, expected: int) -> None:
    process = launch_with(launcher, f"echo $DS_ACCELERATOR $DSLLM_WORLD_SIZE; exit {status}")
    out, err = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "cpu 2"
    assert process.returncode == expected
    if status != 2:  # 0 is what DeepSpeed's launcher ends with where a signal has ended it
        words = f"dsllm: ended by fault: the launcher ended with status {status}, and no rank said why; "
        assert err.splitlines()[-1].startswith(words)


def test_a_launcher_that_is_not_installed_is_one_line(launcher: Path) -> None:
    bare = launcher.parent / "bin"
    bare.mkdir()
    (bare / "sh").symlink_to("/bin/sh")
    process = launch_with(launcher, "", PATH=str(bare))
    launcher.unlink()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    message = "dsllm: deepspeed: not installed; install it (deepspeed by pip install 'dsllm[train]')"
    assert err.splitlines()[-1].startswith(message)


def test_what_a_launcher_leaves_behind_is_ended(launcher: Path) -> None:
    process = launch_with(launcher, "setsid sleep 600 & echo $!; sleep 1; exit 5")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert is_zombie(f"/proc/{out.split()[-1]}"), "or nothing at all"


# --- check -----------------------------------------------------------------------------------------------------------

A_FAILED_CHECK = {"name": "first loss", "passed": False, "expected": "5.96", "found": "87.00", "seconds": 1.25}
ENDS_WITH_IT = f"""
while [ "$1" != --run-dir ]; do shift; done
echo '{json.dumps({"passed": False, "checks": [A_FAILED_CHECK]})}' > "$2/checks.json"
case "$*" in *--check*) echo "chatter of the ranks"; exit 1;; esac
"""


def test_a_check_that_fails_is_told_in_a_table_and_ends_with_1(launcher: Path) -> None:
    process = launch_with(launcher, ENDS_WITH_IT, "check", "quickstart")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    row = next(line for line in out.splitlines() if line.strip().startswith("first loss"))
    assert row.split() == ["first", "loss", "FAILED", "1.2s", "87.00", "5.96"]


def test_as_json_nothing_but_the_answers_is_printed(launcher: Path) -> None:
    process = launch_with(launcher, ENDS_WITH_IT, "check", "quickstart", "--json")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(out) == {"passed": False, "checks": [A_FAILED_CHECK]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-gpus", "3"], "batch.global_batch_size: given 16; micro_batch_size 8 on 3 ranks takes 24 sequences"),
        (["--set", "zero.stage=7"], "quickstart: zero.stage: given 7"),
    ],
)
def test_a_run_that_cannot_be_checked_is_the_users_mistake(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, "check", "quickstart", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"dsllm: {message}")
