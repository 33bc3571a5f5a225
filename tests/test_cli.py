"""The command line: what it prints, where, and the exit status that it ends with."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dsllm.cli.app import app, main
from dsllm.spec.load import load_spec

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _no_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSLLM_DEBUG", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dsllm", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def commands() -> list[list[str]]:
    """Every command with its family, as it is typed."""
    import typer

    found: list[list[str]] = []
    pending: list[tuple[list[str], Any]] = [([], typer.main.get_command(app))]
    while pending:
        path, command = pending.pop()
        found.append(path)
        pending += [([*path, name], child) for name, child in getattr(command, "commands", {}).items()]
    return sorted(found)


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command) or "dsllm")
def test_every_help_shows_what_it_is_for(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    status, out, _ = run(capsys, *command, "--help")
    assert status == 0
    assert "Example: dsllm" in out


# --- faults --------------------------------------------------------------------------------------------------------


def test_a_mistake_is_one_line_on_stderr_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "validate", "1b", "--set", "zero.stage=7")
    assert (status, out) == (2, "")
    assert err.startswith("dsllm: 1b: zero.stage: given 7; must be a whole number from 0 to 3")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["nothing"], ["validate"], ["validate", "1b", "--nothing"], []])
def test_a_command_line_that_makes_no_sense_exits_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert "Traceback" not in out + err


@pytest.mark.parametrize("way", ["option", "variable"])
def test_debugging_shows_the_traceback(way: str) -> None:
    arguments = ["--debug"] if way == "option" else []
    result = subprocess.run(
        [sys.executable, "-m", "dsllm.cli.app", *arguments, "validate", "nothing"],
        env={**os.environ, "DSLLM_DEBUG": "1" if way == "variable" else ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "UserError: nothing: there is no such file" in result.stderr


# --- validate, schema, presets, config -----------------------------------------------------------------------------


def test_validate_says_what_a_valid_spec_comes_to(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "validate", "1b")
    assert status == 0
    assert out == "1b: valid. gpt2-1b: 1.1B parameters, 38,147 steps of 524,288 tokens, 20.0B in all\n"


def test_validate_in_json_holds_facts_or_problems(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "validate", "gpt2-124m", "--json")
    assert status == 0
    assert json.loads(out)["parameters"] == 124_439_808
    status, out, _ = run(capsys, "validate", "gpt2-124m", "--set", "zero.stage=7", "--set", "seed=-1", "--json")
    assert status == 2
    assert [problem.split(":")[0] for problem in json.loads(out)["problems"]] == ["seed", "zero.stage"]


def test_the_schema_accepts_the_sections_of_a_spec(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "schema")
    schema = json.loads(out)
    assert set(load_spec("1b").model_dump()) == set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "presets", "--json")
    rows = {row["preset"]: row for row in json.loads(out)}
    assert rows["llama-7b"]["parameters"] == 6_738_415_616
    assert "llama-7b" in run(capsys, "presets")[1]


def test_config_is_the_resolved_deepspeed_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "config", "1b", "--world-size", "16", "--set", "zero.stage=3")
    document = json.loads(out)
    assert status == 0
    assert document["train_batch_size"] == 512
    assert document["train_micro_batch_size_per_gpu"] * document["gradient_accumulation_steps"] * 16 == 512
    assert document["zero_optimization"]["stage"] == 3
    assert "auto" not in out


def test_config_chooses_an_automatic_micro_batch_for_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for gpu in ("t4-16gb", "h200"):
        _, out, _ = run(capsys, "config", "gpt2-124m", "--world-size", "2", "--gpu", gpu)
        sizes.append(json.loads(out)["train_micro_batch_size_per_gpu"])
    assert sizes[0] < sizes[1]


# --- estimate-memory -----------------------------------------------------------------------------------------------


def test_estimate_memory_keeps_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "estimate-memory", "--spec", "gpt2-124m", "--zero", "3", "--gpus", "8", "--json")
    document = json.loads(out)
    assert status == 0
    assert (document["parameters"], document["zero_stage"], document["world_size"]) == (124_439_808, 3, 8)
    assert document["allocated_parameters"] == 124_475_904
    per_gpu = document["per_gpu"]
    assert set(per_gpu) == {
        f"{term}_bytes"
        for term in (
            "parameters",
            "gradients",
            "optimizer",
            "activations",
            "logits",
            "communication",
            "temporaries",
            "runtime",
            "total",
        )
    }
    assert all(isinstance(value, int) for value in per_gpu.values())
    assert document["peak_phase"] in ("forward", "backward", "step")
    assert isinstance(document["host_bytes"], int)
    assert document["fits"]["a100-40gb"] is True


def test_estimate_memory_lists_every_stage_unless_one_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "estimate-memory", "--params", "1e9", "--json")
    assert [document["zero_stage"] for document in json.loads(out)] == [0, 1, 2, 3]
    assert {document["parameters"] for document in json.loads(out)} == {10**9}
    _, out, _ = run(capsys, "estimate-memory", "--params", "1B", "--gpus", "8")
    assert "1.0B parameters: 30 layers x 1600" in out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("stage ")] == (
        ["stage 0", "stage 1", "stage 2", "stage 3"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "estimate-memory: give one of --params and --spec"),
        (["--params", "1e9", "--spec", "1b"], "estimate-memory: give one of --params and --spec"),
        (["--params", "many"], "--params: given 'many'; must be a number from 1e4 to 1e13, as 1e9, 350M or 1.3B"),
        (["--params", "nan"], "--params: given 'nan'; must be a number"),
        (["--params", "1e9", "--set", "seed=1"], "--set: nothing to override without --spec"),
    ],
)
def test_estimate_memory_refuses_what_it_cannot_use(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, "estimate-memory", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"dsllm: {message}")


# --- launch --------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_command_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(
        capsys, "launch", "quickstart", "--num-gpus", "2", "--run-dir", "my run", "--set", "seed=1", "--dry-run"
    )
    words = shlex.split(out)
    assert status == 0
    assert words[0] == "DS_ACCELERATOR=cpu"
    assert Path(words[1]).name == "deepspeed"
    assert words[2:6] == ["--num_gpus", "2", "--master_port", "29500"]
    assert words[6:8] == ["--log_level", "error"]
    assert words[8] == str(ROOT / "dsllm" / "train.py")
    assert words[9:] == ["--spec", "quickstart", "--run-dir", "my run", "--set", "seed=1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hostfile", "nothing"], "nothing: there is no such hostfile"),
        (["--num-gpus", "3"], "batch.global_batch_size: given 16; micro_batch_size 8 on 3 ranks takes 24 sequences"),
        (["--resume", "nothing"], "--resume: given 'nothing'; there is no such path; must be auto, never or a"),
        (["--num-nodes", "2"], "--num-nodes: given 2 without a hostfile; add --hostfile"),
        (["--set", "zero.stage=7"], "quickstart: zero.stage: given 7"),
        (["--stop-after", "soon"], "--stop-after: given 'soon'; must be a time such as 90s, 45m, 3h50m or 1d2h"),
    ],
)
def test_a_launch_that_cannot_work_is_refused_before_it_starts(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, "launch", "quickstart", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"dsllm: {message}")


def test_an_automatic_micro_batch_still_needs_a_batch_that_divides(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "launch", "gpt2-124m", "--num-gpus", "3", "--dry-run")
    assert status == 2
    assert "given 512; micro_batch_size 1 on 3 ranks takes 3 sequences at a time" in err


@pytest.fixture
def launcher(tmp_path: Path) -> Path:
    """A Python environment's folder whose `deepspeed` is a script of the test."""
    (tmp_path / "python").symlink_to(sys.executable)
    return tmp_path / "deepspeed"


def launch_with(launcher: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    launcher.write_text(f"#!/bin/sh\n{script}\n")
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    program = (
        f"import sys; sys.executable = {str(launcher.parent / 'python')!r}\n"
        "from dsllm.cli.app import main\n"
        f"sys.argv = ['dsllm', *{list(arguments or ('launch', 'quickstart'))!r}]\n"
        "main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


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
    )
    (launcher.parent / "rank.py").write_text(rank)
    process = launch_with(launcher, f"RANK=0 {launcher.parent}/python {launcher.parent}/rank.py; exit $?")
    assert process.stdout is not None
    lines = []
    while "ready" not in lines:
        assert process.poll() is None
        lines.append(process.stdout.readline().strip())
    assert lines[-3:-1] == ["True", "True"], "until a rank answers them, they are ignored"
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
        time.sleep(0.5)  # two pending signals have no order
    assert process.stdout.read().strip() == f"{signal.SIGUSR1:d} {signal.SIGUSR2:d}"
    assert process.wait(timeout=60) == 0


def test_a_launch_ends_with_the_status_of_the_launcher(launcher: Path) -> None:
    process = launch_with(launcher, "echo $DS_ACCELERATOR; exit 7")
    out, _ = process.communicate(timeout=60)
    assert out.splitlines()[-1] == "cpu"
    assert process.returncode == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launch_hands_on_the_signal_and_waits_for_the_run_to_end(launcher: Path, number: signal.Signals) -> None:
    process = launch_with(launcher, "trap 'echo saved; exit 5' TERM INT; echo ready; while :; do sleep 0.05; done")
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert "saved" in process.stdout.read()
    assert process.wait(timeout=60) == 5


# --- check ----------------------------------------------------------------------------------------------------------

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
