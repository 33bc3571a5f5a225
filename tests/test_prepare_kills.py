"""Preparation that is killed with SIGKILL at any moment goes on, and ends with the bytes of an undisturbed one."""

from __future__ import annotations

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


def start(corpus: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), str(corpus), str(folder), "2"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def finish(corpus: Path, folder: Path) -> float:
    """Prepare undisturbed; the seconds it took."""
    began = time.monotonic()
    process = start(corpus, folder)
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


def kill_at_random_moments(folder: Path, kills: int) -> None:
    corpus = write_corpus(folder / "corpus", documents=400, words=1200)
    seconds = finish(corpus, folder / "clean")
    expected = contents(folder / "clean")
    moments = random.Random(kills)
    for number in range(kills):
        process = start(corpus, folder / "data")
        time.sleep(moments.uniform(0.1, 1.0) * seconds)
        workers = workers_of(process)
        process.send_signal(signal.SIGKILL)  # the workers are not told
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive, "workers outlive the process that they work for"
        if (folder / "data" / "manifest.json").exists() or number == kills - 1:
            finish(corpus, folder / "data")
            assert contents(folder / "data") == expected
            shutil.rmtree(folder / "data")


@pytest.mark.timeout(300)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, kills=5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_fifty_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, kills=50)
