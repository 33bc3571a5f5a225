"""Runs real ranks under DeepSpeed's launcher, with a time limit that leaves no process behind.

`run_ranks` starts a script as a user would: `deepspeed --num_gpus N script ...`. `run_python_ranks` calls a function of
a file on every rank and returns what it returned: a start takes seconds, so a function should do a list of cases.

On the ranks this file is itself the script (see `_call_on_this_rank`).
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
RUN_ID = "RANK_HARNESS_RUN_ID"  # in the environment of every process of a run, wherever it was re-parented to
LAST_LINES = 40
TRACEBACK_SECONDS = 2.0


class RanksFailed(AssertionError):
    """Ranks that hung or failed: the message holds the last lines of each."""


@dataclass(frozen=True)
class RankResult:
    """How a launch ended. Ranks write stdout and stderr into one text each."""

    returncode: int
    seconds: float
    launcher_output: str
    rank_outputs: tuple[str, ...]
    left_behind: tuple[str, ...]
    """Processes that were still there when the launcher had ended; they are killed then."""


def run_ranks(
    script_args: Sequence[str | Path],
    *,
    num_ranks: int,
    timeout_seconds: float,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> RankResult:
    """`deepspeed --num_gpus <num_ranks> <script_args>` on this machine's CPU.

    Raises RanksFailed when it runs past `timeout_seconds`, naming the ranks that were still alive and where they were,
    and, with `check`, when it exits with anything but 0.
    """
    deepspeed = Path(sys.executable).parent / "deepspeed"
    command = [deepspeed, "--num_gpus", str(num_ranks), "--master_port", str(free_port()), "--enable_each_rank_log"]
    with tempfile.TemporaryDirectory() as folder:
        command += [Path(folder) / "ranks", *script_args]
        return _run(command, num_ranks, timeout_seconds, cwd, env, check, Path(folder))


def run_launch(
    arguments: Sequence[str | Path],
    *,
    num_ranks: int,
    timeout_seconds: float,
    env: Mapping[str, str] | None = None,
    check: bool = True,
    port: int | None = None,
) -> RankResult:
    """`dsllm launch <arguments>`, otherwise as `run_ranks`. All that the ranks write is in `launcher_output`."""
    launch = [sys.executable, "-m", "dsllm.cli.app", "launch", "--num-gpus", str(num_ranks)]
    command = [*launch, "--master-port", str(port or free_port()), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        return _run(command, num_ranks, timeout_seconds, ROOT, env, check, Path(folder))


def _run(
    command: Sequence[str | Path],
    num_ranks: int,
    timeout_seconds: float,
    cwd: Path,
    env: Mapping[str, str] | None,
    check: bool,
    logs: Path,
) -> RankResult:
    started = time.monotonic()
    environment = _environment(num_ranks, uuid.uuid4().hex, env)
    returncode, hung, left = _launch(command, timeout_seconds, cwd, environment, logs)
    result = RankResult(returncode, time.monotonic() - started, *_read_logs(logs, num_ranks), tuple(left))
    if hung:
        raise RanksFailed(f"still running after {timeout_seconds:g} s: {', '.join(hung)}\n{last_lines(result)}")
    if check and returncode != 0:
        raise RanksFailed(f"exit status {returncode}\n{last_lines(result)}")
    return result


def run_python_ranks(
    file: Path,
    function: str,
    arguments: Mapping[str, Any],
    *,
    num_ranks: int,
    timeout_seconds: float,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """What `function(**arguments)` of `file` returned on rank 0, 1, ... Arguments and results travel as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        (results / "arguments.json").write_text(json.dumps(dict(arguments)))
        script_args = [Path(__file__), file, function, results]
        run_ranks(script_args, num_ranks=num_ranks, timeout_seconds=timeout_seconds, cwd=cwd, env=env)
        return [json.loads((results / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


def last_lines(result: RankResult, count: int = LAST_LINES) -> str:
    """The end of the launcher's and of each rank's output, under a heading each."""
    outputs = {"launcher": result.launcher_output}
    outputs |= {f"rank {rank}": output for rank, output in enumerate(result.rank_outputs)}
    return "\n".join(f"--- {name}\n" + "\n".join(text.splitlines()[-count:]) for name, text in outputs.items())


def processes_of(run_id: str) -> list[psutil.Process]:
    """Every live process that inherited `run_id`, in whatever group or session it is by now."""
    return [process for process in psutil.process_iter() if _environment_of(process).get(RUN_ID) == run_id]


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _launch(
    command: Sequence[str | Path],
    timeout_seconds: float,
    cwd: Path,
    env: dict[str, str],
    logs: Path,
) -> tuple[int, list[str], list[str]]:
    """The exit status, the ranks that were alive at the time limit, and what the launcher left behind."""
    with (logs / "launcher.log").open("wb") as log:
        launcher = subprocess.Popen(
            [str(part) for part in command], cwd=cwd, env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return launcher.wait(timeout_seconds), [], _names(processes_of(env[RUN_ID]))
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL, _dump_tracebacks(env[RUN_ID]), []
        finally:
            _kill(env[RUN_ID])
            launcher.wait()


def _environment(num_ranks: int, run_id: str, extra: Mapping[str, str] | None) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, cores // num_ranks)),
        "OMP_WAIT_POLICY": "PASSIVE",  # idle threads that spin would starve the tests of the other worker
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja lives beside python
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",
        **(extra or {}),
        RUN_ID: run_id,
    }


def _environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):  # ended meanwhile, or another user's
        return {}


def _dump_tracebacks(run_id: str) -> list[str]:
    """The ranks that are alive. Python's fault handler writes where each of them is into its log, which ends it."""
    ranks = {process: _environment_of(process).get("RANK") for process in processes_of(run_id)}
    for process, rank in ranks.items():
        if rank is not None:
            _signal(process, signal.SIGABRT)
    psutil.wait_procs([process for process, rank in ranks.items() if rank is not None], timeout=TRACEBACK_SECONDS)
    return sorted({f"rank {rank}" for rank in ranks.values() if rank is not None}) or ["the launcher, and no rank yet"]


def _names(processes: Sequence[psutil.Process]) -> list[str]:
    """Their command lines, without those that end within a moment."""
    _, alive = psutil.wait_procs(processes, timeout=2)
    names = []
    for process in alive:
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(process.cmdline()))
    return names


def _kill(run_id: str) -> None:
    """Kills what is left of a run, and again what that may have started while it died."""
    while processes := processes_of(run_id):
        for process in processes:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(processes, timeout=5)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _read_logs(logs: Path, num_ranks: int) -> tuple[str, tuple[str, ...]]:
    """The launcher names a rank's file `<time>_rank<r>.log`; a rank that never started has none."""
    launcher = (logs / "launcher.log").read_text(errors="replace")
    files = [next((logs / "ranks").glob(f"*_rank{rank}.log"), None) for rank in range(num_ranks)]
    return launcher, tuple(file.read_text(errors="replace") if file else "" for file in files)


def _call_on_this_rank(file: str, function: str, results: str) -> None:
    arguments = json.loads((Path(results) / "arguments.json").read_text())
    result = runpy.run_path(file)[function](**arguments)
    (Path(results) / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _call_on_this_rank(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
