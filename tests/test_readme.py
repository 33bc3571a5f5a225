"""The README's commands run, in its order, and what it shows of the light ones is what they print."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import RUN_ID, free_port, processes_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
GENERATE = runpy.run_path(str(ROOT / "docs/generate.py"))
EXAMPLES: list[Any] = GENERATE["examples"](README)
LIGHT = [example for example in EXAMPLES if example.is_light]
HEAVY = [example for example in EXAMPLES if not example.is_light and not example.command.startswith("pip install ")]
SECONDS_A_COMMAND = 240


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    GENERATE["make_workspace"](tmp_path, README)
    return tmp_path


def test_the_readme_opens_with_two_commands_that_make_has() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    promised = re.findall(r"^    make (\w+)$", README, re.MULTILINE)
    assert promised == ["demo", "test"]
    assert set(promised) <= set(targets)


@pytest.mark.parametrize("example", LIGHT, ids=lambda example: example.command)
def test_a_light_command_prints_what_the_readme_shows(example: Any, workspace: Path) -> None:
    printed = GENERATE["run_light"](example.command, workspace)
    assert "Traceback" not in printed
    if example.output is not None:
        assert printed == example.output, "run python docs/generate.py"


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_the_journey_from_text_to_an_exported_model_runs_as_the_readme_tells_it(workspace: Path) -> None:
    programs = [example.command.split()[0] for example in HEAVY]
    assert programs == [*["dsllm"] * 3, "deepspeed", *["dsllm"] * 6]
    printed = [_run(_with_a_free_port(example.command), workspace) for example in HEAVY]
    for example, output in zip(HEAVY, printed, strict=True):
        assert _lines(example.output or "") <= _lines(output), f"{example.command}\n{output}"

    run = workspace / "runs/quickstart"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, 41))
    assert steps[-1]["val_loss"] < steps[0]["val_loss"] - 1.0
    assert any(output.startswith("def main(") for output in printed)
    _run(shlex.join([sys.executable, "-c", _python_of_the_readme()]), workspace)


def _lines(output: str) -> set[str]:
    """The lines of an output but `…`, without their numbers, which differ from machine to machine."""
    return {re.sub(r"\d[\d.,a-z]*", "#", line.strip()) for line in output.splitlines()} - {"", "…"}


def _python_of_the_readme() -> str:
    match = re.search(r"^```python\n(.*?)^```\n", README, re.MULTILINE | re.DOTALL)
    assert match, "the README loads the exported model"
    return match[1]


def _with_a_free_port(command: str) -> str:
    """The command as the README has it, but on a port that no other run of this machine listens on."""
    for start, option in (("dsllm launch ", "--master-port"), ("deepspeed ", "--master_port")):
        if command.startswith(start):
            return f"{start}{option} {free_port()} {command.removeprefix(start)}"
    return command


def _run(command: str, workspace: Path) -> str:
    """What a command prints; its ranks end with it, whatever becomes of it."""
    run_id = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_WAIT_POLICY": "PASSIVE",  # idle threads that spin would starve the tests of the other worker
        RUN_ID: run_id,
    }
    try:
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=workspace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS_A_COMMAND,
            check=False,
        )
    finally:
        for process in processes_of(run_id):
            process.kill()
    assert result.returncode == 0, f"{command}\n{result.stdout}"
    return result.stdout
