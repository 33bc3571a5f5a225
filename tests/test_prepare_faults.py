"""Preparation on a disk that fills up, and under Ctrl-C: one line, nothing half-written, nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_text import text_spec, write_corpus
from test_prepare import contents

from dsllm.data.preparation import join
from dsllm.data.prepare import prepare
from dsllm.data.sources import text
from dsllm.errors import UserError
from dsllm.spec.load import dump_spec

FIRST_BYTES, MORE_BYTES, ENOUGH_BYTES = 2**17, 2**15, 2**22


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, too small; `resize` gives it more room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={FIRST_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, size_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", str(folder)], check=True)


@pytest.mark.parametrize("drops", ["false", "true"])
def test_a_disk_that_fills_up_again_and_again_loses_nothing(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drops: str
) -> None:
    monkeypatch.setattr(text, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(join, "_PIECES_BETWEEN_NOTES", 3)
    corpus = write_corpus(tmp_path / "corpus", documents=150, words=360)
    spec = text_spec(corpus, "data.shard_tokens=30000", f"data.drop_duplicates={drops}")
    prepare(spec, tmp_path / "clean", processes=1)
    refusals: list[str] = []
    for size_bytes in range(FIRST_BYTES, ENOUGH_BYTES, MORE_BYTES):
        resize(small_disk, size_bytes)
        try:
            prepare(spec, small_disk / "data", processes=1)
            break
        except UserError as error:
            refusals.append(str(error))
            assert [path.name for path in small_disk.rglob("*") if ".partial" not in path.parts] in ([], ["data"])
    assert len(refusals) >= 3
    assert set(refusals) == {
        f"{small_disk / 'data'}: the disk is full; nothing that was finished is lost: free some space and give the "
        f"same command again, or set data.directory elsewhere"
    }
    assert contents(small_disk / "data") == contents(tmp_path / "clean")


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=300, words=20_000)  # 35 MB: many seconds in two processes
    (tmp_path / "small.yaml").write_text(dump_spec(text_spec(corpus, f"data.directory={tmp_path / 'data'}")))
    command = [sys.executable, "-m", "dsllm.cli.app", "data", "prepare", str(tmp_path / "small.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        pieces = tmp_path / "data" / ".partial" / "pieces"
        deadline = time.monotonic() + 60
        while not any(pieces.rglob("*.npz")):
            assert process.poll() is None, "it ended before it was interrupted"
            assert time.monotonic() < deadline, "no piece was ever written"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches all processes of the command
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert errors.strip().count(b"\n") == 0
    assert not (tmp_path / "data" / "manifest.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    assert "300 documents" in again.stdout
