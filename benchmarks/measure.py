"""What the benchmarks share: starting ranks, reading a run's metrics, and describing the machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsllm.errors import DsllmError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Allocators, thread pools and kernels settle in the first steps.
FIRST_STEPS = 5


def start_ranks(
    script: str, arguments: Sequence[str], num_ranks: int, log: Path, accelerator: str, seconds: float | None = None
) -> None:
    """`deepspeed --num_gpus <num_ranks> <script> <arguments>`; all it prints goes to `log`.

    Raises DsllmError with the last lines of the log where it fails, and where it takes longer than `seconds`.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks)]
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    environment = {**os.environ, "DS_ACCELERATOR": accelerator, "OMP_NUM_THREADS": str(threads)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # ninja lives beside python
    with log.open("wb") as output:
        command = [*launcher, "--master_port", str(port), str(ROOT / script), *arguments]
        ranks = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = ranks.wait(seconds)
        except BaseException as error:
            os.killpg(ranks.pid, signal.SIGKILL)
            ranks.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise DsllmError(f"{script} was stopped after {seconds:.0f} s") from error
            raise
    if status != 0:
        last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise DsllmError(f"{script} exited with {status}; the end of its log:\n{last_lines}")


def train(spec: str, overrides: Sequence[str], run_dir: Path, num_ranks: int, accelerator: str) -> list[dict[str, Any]]:
    """Trains from the start as a user would; returns the lines of `metrics.jsonl`."""
    arguments = ["--spec", spec, "--run-dir", str(run_dir), "--resume", "never"]
    arguments += [part for override in ("guards.step_0_checks=false", *overrides) for part in ("--set", override)]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    start_ranks("dsllm/train.py", arguments, num_ranks, run_dir.with_suffix(".log"), accelerator)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps_argument(text: str) -> int:
    """The type of `--steps`: enough that some are left when the first ones are dropped."""
    steps = int(text)
    # The Trainer's clock needs one step more to start on.
    if steps < FIRST_STEPS + 2:
        raise argparse.ArgumentTypeError(
            f"given {steps}; the first {FIRST_STEPS} do not count: take {FIRST_STEPS + 2} or more"
        )
    return steps


def settled_median(steps: Sequence[float]) -> float:
    """Median over steps, the first ones left out."""
    return statistics.median(steps[FIRST_STEPS:])


def describe_machine() -> dict[str, Any]:
    """Processor, cores and the versions that speed depends on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
    }


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Writes `benchmarks/results/<name>`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / name
    path.write_text(_as_json(results))
    return path


def _as_json(results: dict[str, Any]) -> str:
    """An entry a line, and of a list of rows each row on a line of its own: a table that can be read and compared."""
    entries = []
    for name, value in results.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
        entries.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
