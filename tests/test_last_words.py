"""What a failed rank leaves behind: the cause, named right, and never an error of its own."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed

from dsllm.engine import last_words, rank_output
from dsllm.errors import (
    Cause,
    CheckpointError,
    DataError,
    DsllmError,
    OneRankError,
    SpecError,
    TrainingError,
    UserError,
)
from tests.distributed.harness import ROOT


def raised_from(error: Exception, earlier: BaseException) -> Exception:
    """As `raise error from earlier` leaves it."""
    error.__cause__ = earlier
    return error


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "file.pt")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (UserError("--spec: given x"), "user_error"),
        (SpecError(["seed: given -1"]), "user_error"),
        (raised_from(DataError("a.txt: cannot be read"), full_disk()), "user_error"),
        (OneRankError("rank 1: out of memory", cause="out_of_memory"), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"), "communication"),
        (distributed.DistNetworkError("The server socket has failed to listen: EADDRINUSE"), "communication"),
        (
            RuntimeError("[third_party/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
            "communication",
        ),
        (RuntimeError("NCCL communicator was aborted on rank 1."), "communication"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "communication"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "communication"),
        (full_disk(), "disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk"),
        (OSError(errno.EROFS, "Read-only file system"), "disk"),
        (raised_from(CheckpointError("it could not be written"), full_disk()), "disk"),
        (raised_from(CheckpointError("…"), raised_from(RuntimeError("unexpected pos"), full_disk())), "disk"),
        (raised_from(TrainingError("rank 1: ValueError", cause="fault"), distributed.DistError("closed")), "fault"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "fault"),
        (ValueError("out of memory"), "fault"),
        (TrainingError("it cannot go on"), "fault"),
    ],
    ids=str,
)
def test_every_error_has_its_cause(error: Exception, cause: Cause) -> None:
    assert last_words.cause_of(error) == cause


def test_what_an_error_hides_on_purpose_is_not_its_cause() -> None:
    error = TrainingError("it cannot go on")
    error.__context__, error.__suppress_context__ = full_disk(), True
    assert last_words.cause_of(error) == "fault"


def test_causes_are_told_where_torch_was_never_imported() -> None:
    script = (
        "import sys; from dsllm.engine import last_words as l; "
        "print(l.cause_of(MemoryError()), l.cause_of(ConnectionResetError()), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split() == ["out_of_memory", "communication", "False"]


def test_last_words_say_who_when_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSLLM_LAUNCH", "0123456789abcdef")
    before = time.time()
    last_words.write_error(tmp_path / "logs", 3, TrainingError("rank 1 is gone", cause="lost_rank", is_own=False))
    words = json.loads((tmp_path / "logs" / "rank3.ended.json").read_text())
    assert before <= words.pop("time") <= time.time()
    assert words == {
        "launch": "0123456789abcdef",
        "rank": 3,
        "host": socket.gethostname(),
        "cause": "lost_rank",
        "exit_status": 1,
        "message": "rank 1 is gone",
        "is_own": False,
    }
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank3.ended.json"]


def test_an_error_that_dsllm_does_not_know_is_named_by_its_kind(tmp_path: Path) -> None:
    last_words.write_error(tmp_path, 0, KeyError("lost"))
    words = json.loads((tmp_path / "rank0.ended.json").read_text())
    assert (words["launch"], words["cause"], words["message"]) == (None, "fault", "KeyError: 'lost'")
    assert words["is_own"]


def test_a_mistake_of_the_user_has_its_own_status(tmp_path: Path) -> None:
    last_words.write_error(tmp_path, 0, UserError("--spec: given x"))
    words = json.loads((tmp_path / "rank0.ended.json").read_text())
    assert (words["cause"], words["exit_status"]) == ("user_error", 2)


def test_a_start_that_is_refused_leaves_no_folder_outside_of_a_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSLLM_LAUNCH", raising=False)
    last_words.write_error(tmp_path / "run" / "logs", 0, UserError("--spec: given x"))
    assert list(tmp_path.iterdir()) == []


def test_writing_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSLLM_LAUNCH", "0123456789abcdef")
    (tmp_path / "file").touch()
    last_words.write_error(tmp_path / "file" / "logs", 0, UserError("the first error"))
    last_words.forget(tmp_path / "file" / "logs", 0)
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(full_disk()))
    last_words.write_error(tmp_path, 0, UserError("the first error"))
    assert not (tmp_path / "rank0.ended.json").exists()


def test_a_start_forgets_the_words_of_its_own_rank_alone(tmp_path: Path) -> None:
    for rank in (0, 1):
        last_words.write_error(tmp_path, rank, UserError("of an earlier attempt"))
    rank_output.begin(tmp_path, 1)
    rank_output.begin(tmp_path, 1)  # nothing to forget
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.ended.json"]


SPEAKS = """
import os, subprocess, sys
from pathlib import Path
from dsllm.engine import rank_output
rank_output.begin(Path(sys.argv[1]), int(sys.argv[2]))
print("by Python", flush=True)
subprocess.run(["sh", "-c", "echo by a child >&2"])
"""


@pytest.mark.parametrize(
    ("rank", "launch", "is_on_screen"), [(0, "1", True), (1, "1", False), (1, None, True)], ids=str
)
def test_of_a_launch_only_rank_0_speaks_on_the_screen(
    tmp_path: Path, rank: int, launch: str | None, is_on_screen: bool
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DSLLM_LAUNCH"}
    if launch is not None:
        environment["DSLLM_LAUNCH"] = launch
    log = rank_output.log_file(tmp_path / "logs", rank)
    log.parent.mkdir()
    log.write_text("of an earlier attempt\n")
    command = [sys.executable, "-c", SPEAKS, tmp_path / "logs", str(rank)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    words = "by Python\n", "by a child\n"
    assert (result.stdout, result.stderr) == (words if is_on_screen else ("", ""))
    assert log.read_text() == "of an earlier attempt\n" + ("" if is_on_screen else "".join(words))


def test_an_error_says_its_cause_and_whose_it_is() -> None:
    assert (UserError("x").cause, DsllmError("x").cause, DsllmError("x").is_own) == ("user_error", "fault", True)
    assert DsllmError("x", cause="disk", is_own=False).cause == "disk"
