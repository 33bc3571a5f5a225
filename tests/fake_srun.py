"""Stands in for Slurm's `srun` where tests run: a real one needs slurmctld and slurmd, as root, beside munge.

It starts every task on this machine, whatever node is asked for. What it does besides is what was seen of Slurm 22.05:
it hands SIGUSR1 and SIGUSR2 on to every process of the step, kills the step at SIGTERM and SIGHUP, ends it when a task
fails, and exits with the highest status of all. It takes the options of `dsllm/launch/slurm.py`, and no others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time

FLAGS = ("--overlap", "--overcommit", "--quiet")
CHOICES = ("--distribution", "--mpi", "--export", "--cpu-bind", "--gpu-bind", "--kill-on-bad-exit", "--input")
KILL_WAIT_SECONDS = 5.0


def main() -> int:
    """Run a step. Returns its exit status."""
    options = parse()
    nodes = options.nodelist.split(",")
    assert len(nodes) == options.nodes, "the list of nodes is as long as their number"
    assert options.ntasks == options.nodes * options.ntasks_per_node
    tasks: list[subprocess.Popen[bytes]] = []
    killed = []

    def hand_on(number: int, frame: object) -> None:
        send(tasks, number)

    def kill(number: int, frame: object) -> None:
        killed.append(number)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, hand_on)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, kill)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    for task in range(options.ntasks):
        tasks.append(start(task, nodes, options))
    while any(task.poll() is None for task in tasks) and not killed:
        if options.kill_on_bad_exit and any(task.returncode for task in tasks):
            break
        time.sleep(0.05)
    end(tasks)
    return max(status_of(task) for task in tasks)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--nodes", "--ntasks", "--ntasks-per-node"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--nodelist", required=True)
    for name in CHOICES:
        parser.add_argument(name)
    for name in FLAGS:
        parser.add_argument(name, action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args()


def start(task: int, nodes: list[str], options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Tasks are started with signals as slurmd has them, not as srun's own parent set them."""
    node, local = divmod(task, options.ntasks_per_node)
    variables = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": task,
        "SLURM_LOCALID": local,
        "SLURM_NODEID": node,
        "SLURM_NTASKS": options.ntasks,
        "SLURM_STEP_NUM_TASKS": options.ntasks,
        "SLURM_STEP_TASKS_PER_NODE": f"{options.ntasks_per_node}(x{options.nodes})",
        "SLURM_STEP_NODELIST": options.nodelist,
        "SLURMD_NODENAME": nodes[node],
    }
    return subprocess.Popen(
        options.command,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        stdin=subprocess.DEVNULL if options.input == "none" else None,
        start_new_session=True,
        preexec_fn=restore_signals,
    )


def restore_signals() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())


def send(tasks: list[subprocess.Popen[bytes]], number: int) -> None:
    """To every process of every task that runs."""
    for task in tasks:
        if task.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(task.pid, number)


def end(tasks: list[subprocess.Popen[bytes]]) -> None:
    """What still runs: asked, then forced."""
    send(tasks, signal.SIGTERM)
    deadline = time.monotonic() + KILL_WAIT_SECONDS
    while any(task.poll() is None for task in tasks) and time.monotonic() < deadline:
        time.sleep(0.05)
    send(tasks, signal.SIGKILL)
    for task in tasks:
        task.wait()


def status_of(task: subprocess.Popen[bytes]) -> int:
    return 128 - task.returncode if task.returncode < 0 else task.returncode


if __name__ == "__main__":
    sys.exit(main())
