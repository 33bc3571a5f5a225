"""Preparation that is killed with SIGKILL at any moment goes on, and ends with the bytes of an undisturbed one."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small_text import write_corpus
from test_prepare import contents

SCRIPT = Path(__file__).with_name("prepare_small_pieces.py")


def start(corpus: Path, folder: Path, kind: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), str(corpus), str(folder), kind]
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def finish(corpus: Path, folder: Path, kind: str) -> float:
    """Prepare undisturbed; the seconds it took."""
    began = time.monotonic()
    process = start(corpus, folder, kind)
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors.decode()
    return time.monotonic() - began


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def text_of(folder: Path, kind: str) -> Path:
    """Text of 400 documents, some of them twice: files, or compressed lines."""
    corpus = write_corpus(folder / "files", documents=400, words=1200)
    for number in range(0, 400, 9):
        shutil.copy(corpus / f"document-{number:03d}.txt", corpus / f"copy-{number:03d}.txt")
    if kind == "text":
        return corpus
    lines = (json.dumps({"text": path.read_text()}) + "\n" for path in sorted(corpus.iterdir()))
    with gzip.open(folder / "lines.jsonl.gz", "wt") as file:
        file.writelines(lines)
    return folder / "lines.jsonl.gz"


def kill_at_random_moments(folder: Path, kind: str, kills: int) -> None:
    corpus = text_of(folder, kind)
    seconds = finish(corpus, folder / "clean", kind)
    expected = contents(folder / "clean")
    moments = random.Random(kills)
    kills_at_work = 0
    for number in range(kills):
        process = start(corpus, folder / "data", kind)
        time.sleep(moments.uniform(0.2, 1.0) * seconds)
        workers = workers_of(process)
        process.send_signal(signal.SIGKILL)  # the workers are not told
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive, "workers outlive the process that they work for"
        kills_at_work += any((folder / "data").glob(".partial/pieces/*/*.npz"))
        if (folder / "data" / "manifest.json").exists() or number == kills - 1:
            finish(corpus, folder / "data", kind)
            assert contents(folder / "data") == expected
            shutil.rmtree(folder / "data")
    assert kills_at_work >= kills // 3, "the kills came too early or too late to meet any work"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, kind: str) -> None:
    kill_at_random_moments(tmp_path, kind, kills=4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_killed_at_fifty_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, kind: str) -> None:
    kill_at_random_moments(tmp_path, kind, kills=50)
