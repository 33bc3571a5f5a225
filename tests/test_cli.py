"""The command line: what it prints, where, and the exit status that it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
