"""dsllm/train.py run several times in one start of DeepSpeed, which takes longer than a small run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as distributed


def attempt_each(runs: list[list[str]]) -> list[dict[str, Any]]:
    """Every one of `runs`, in turn."""
    return [attempt(arguments) for arguments in runs]


def tell(flags: list[str], run: str, data: str, small_disk: str | None) -> dict[str, Any]:
    """A run meets one fault after the other, and goes on after each: what every attempt ended with on this rank."""
    checkpoints = Path(run) / "checkpoints"
    told = {"first": attempt([*flags, "--run-dir", run])}
    told["finished already"] = attempt([*flags, "--run-dir", run])
    told["other seed"] = attempt([*flags, "--run-dir", run, "--set", "seed=7"])
    told["never"] = attempt([*flags, "--run-dir", run, "--resume", "never"])
    told["nothing there"] = attempt([*flags, "--run-dir", run, "--resume", str(checkpoints / "global_step77")])
    told |= meet_damage(flags, run)
    told["copy fails"] = without_memory_for_copies([*flags, "--run-dir", run + "-4"])
    with replaced(Path(data) / "corpus-train-00000.bin", lambda content: bytes([content[0] ^ 1]) + content[1:]):
        told["corrupt shard"] = attempt([*flags, "--run-dir", run + "-2"])
    told["too high a rate"] = attempt([*flags, "--run-dir", run + "-3", "--set", "optimizer.learning_rate=1e30"])
    if small_disk is not None:
        told |= meet_a_full_disk(flags, small_disk)
    return told


def without_memory_for_copies(arguments: list[str]) -> dict[str, Any]:
    """Rank 1 cannot copy its state to host memory: nothing that it writes may count."""
    from dsllm.checkpoint.snapshot import Snapshot

    def fail(snapshot: Snapshot) -> None:
        raise MemoryError  # without a word, as the system raises it

    usual = Snapshot.copy
    if distributed.get_rank() == 1:
        Snapshot.copy = fail
    try:
        return attempt(arguments)
    finally:
        Snapshot.copy = usual


def meet_damage(flags: list[str], run: str) -> dict[str, Any]:
    """What is on the disk changes between a run's end and its next start; what it goes on from then, and ends with."""
    newest, told = Path(run) / "checkpoints" / "global_step4", {}
    state = next(newest.glob("*rank_1*optim_states.pt"))
    damage: dict[str, Callable[[], Any]] = {
        "latest gone": lambda: (newest.parent / "latest").unlink(),
        "latest elsewhere": lambda: (newest.parent / "latest").write_text("global_step99"),
        "cut file": lambda: os.truncate(state, state.stat().st_size // 2),
        "flipped byte": lambda: flip_byte(state),
        "missing file": state.unlink,
        "no manifest": (newest / "manifest.json").unlink,
        "flipped manifest": lambda: flip_byte(newest / "manifest.json"),
    }
    for name, change in damage.items():
        on_rank_0(change)
        told[name] = attempt([*flags, "--run-dir", run])
    on_rank_0(lambda: [flip_byte(folder / state.name) for folder in newest.parent.glob("global_step*")])
    told["all damaged"] = attempt([*flags, "--run-dir", run])
    told["named and damaged"] = attempt([*flags, "--run-dir", run, "--resume", str(newest)])
    return told


def flip_byte(path: Path) -> None:
    """One byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def meet_a_full_disk(flags: list[str], run: str) -> dict[str, Any]:
    """`run`/checkpoints is a disk with room for the first checkpoint of three, and later there is room."""
    from dsllm.checkpoint.save import CheckpointSaver

    checkpoints = Path(run) / "checkpoints"
    longer = [*flags, "--run-dir", run, "--set", "training.train_steps=6"]
    told = {"full disk, to stop": attempt([*longer, "--set", "checkpoint.on_failure=stop"])}
    told["full disk"] = attempt(longer)
    told["latest on it"] = (checkpoints / "latest").read_text()
    forecast = CheckpointSaver._lack_of_room
    CheckpointSaver._lack_of_room = lambda saver: None  # as where another program takes the room meanwhile
    told["filled up meanwhile"] = attempt(longer)
    CheckpointSaver._lack_of_room = forecast
    told["left on it"] = {path.name: path.is_dir() for path in sorted(checkpoints.iterdir())}
    remount(checkpoints, "ro")
    told["read-only"] = attempt(longer)
    remount(checkpoints, "rw,size=64m")
    told["with room"] = attempt(longer)
    return told


def remount(disk: Path, options: str) -> None:
    on_rank_0(lambda: subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True))


def attempt(arguments: list[str]) -> dict[str, Any]:
    """dsllm/train.py with `arguments`, on every rank together: its exit status, what it wrote to stderr, and the cause
    that it left in its last words."""
    from dsllm.train import main

    if distributed.is_initialized():
        distributed.barrier()
    errors = io.StringIO()
    before = sys.argv
    sys.argv = ["train.py", *arguments]
    try:
        with contextlib.redirect_stderr(errors):
            status = main()
    finally:
        sys.argv = before
    return {"status": status, "stderr": errors.getvalue(), "cause": cause_left_in(arguments)}


def cause_left_in(arguments: list[str]) -> str | None:
    """By this rank, in the folder of the run."""
    run = Path(arguments[len(arguments) - 1 - arguments[::-1].index("--run-dir") + 1])
    words = run / "logs" / f"rank{distributed.get_rank() if distributed.is_initialized() else 0}.ended.json"
    return json.loads(words.read_text())["cause"] if words.is_file() else None


@contextlib.contextmanager
def replaced(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """`path` with other content, on every rank at once."""
    original = path.read_bytes()
    on_rank_0(lambda: path.write_bytes(change(original)))
    yield
    on_rank_0(lambda: path.write_bytes(original))


def on_rank_0(work: Callable[[], Any]) -> None:
    distributed.barrier()
    if distributed.get_rank() == 0:
        work()
    distributed.barrier()
