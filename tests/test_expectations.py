"""A world of another size, or of one machine instead of many, ends before it begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsllm.errors import UserError
from dsllm.launch import expectations
from dsllm.launch.expectations import Ancestor, ancestors, check_world, deepspeed_words, hostfile_in
from dsllm.launch.placement import Place

TRAIN = Path(__file__).parent.parent / "dsllm" / "train.py"
PLACE = Place(1, 1, 4, 4, "Open MPI")


@pytest.mark.parametrize("environment", [{}, {"DSLLM_WORLD_SIZE": "4"}])
def test_the_world_that_was_asked_for_is_no_error(environment: dict[str, str]) -> None:
    check_world(PLACE, environment)


def test_another_world_is_refused_with_both_sizes() -> None:
    with pytest.raises(UserError, match=r"^DSLLM_WORLD_SIZE: given 16, and Open MPI started 4 ranks; they must be the"):
        check_world(PLACE, {"DSLLM_WORLD_SIZE": "16"})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("python /env/bin/deepspeed --hostfile x train.py", "--hostfile x train.py"),
        ("/env/bin/python -u -m deepspeed.launcher.runner -H x train.py", "-H x train.py"),
        ("deepspeed -Hx train.py", "-Hx train.py"),
        ("python -m deepspeed.launcher.launch --world_info=x", None),
        ("bash", None),
        ("", None),
    ],
)
def test_deepspeeds_launcher_is_known_by_its_command_line(line: str, words: str | None) -> None:
    assert deepspeed_words(line.split()) == (None if words is None else words.split())


@pytest.mark.parametrize(
    ("line", "hostfile"),
    [
        ("--hostfile hosts train.py", "hosts"),
        ("--num_gpus 2 --hostfile=hosts train.py", "hosts"),
        ("-H hosts train.py", "hosts"),
        ("-Hhosts train.py", "hosts"),
        ("--host hosts train.py", "hosts"),
        ("--hostfile a --hostfile b train.py", "b"),
        ("--num_gpus 2 train.py --hostfile hosts", None),
        ("--num_gpus 2 train.py", None),
        ("--help", None),
    ],
)
def test_the_hostfile_is_read_as_deepspeed_reads_it(line: str, hostfile: str | None) -> None:
    assert hostfile_in(line.split()) == hostfile


def test_the_processes_above_are_seen_with_their_words_and_folders(tmp_path: Path) -> None:
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        parent = next(ancestors(pid))
        child.kill()
    assert parent.words == Path(f"/proc/{os.getpid()}/cmdline").read_text().rstrip("\0").split("\0")
    assert parent.cwd == Path.cwd()


@pytest.mark.parametrize(
    ("hostfile", "is_missing"),
    [("hosts", False), ("other", True), ("folder", True), ("/job/hostfile", False), ("/dev/null", False)],
)
def test_a_hostfile_is_missing_where_the_launcher_finds_no_file_and_was_not_told_so_on_purpose(
    hostfile: str, is_missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").touch()
    (tmp_path / "folder").mkdir()
    above = [Ancestor(["bash"], Path("/")), Ancestor(["deepspeed", "-H", hostfile, "train.py"], tmp_path)]
    monkeypatch.setattr(expectations, "ancestors", lambda pid: iter(above))
    assert expectations.missing_hostfile() == (hostfile if is_missing else None)


@pytest.mark.distributed
@pytest.mark.parametrize("option", ["--hostfile hosts/missing", "--hostfile=hosts/missing"])
def test_deepspeed_with_a_missing_hostfile_ends_at_once_and_says_so_once(option: str, tmp_path: Path) -> None:
    """Where it would train on this machine alone, and end with 0."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    result = subprocess.run(
        [deepspeed, *option.split(), "--num_gpus", "2", TRAIN, "--spec", "quickstart", "--run-dir", tmp_path / "run"],
        cwd=tmp_path,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    said = (
        "deepspeed was given --hostfile hosts/missing, which is not there, and started 2 ranks on this machine alone; "
        "correct the path, or leave --hostfile out\n"
    )
    assert result.stderr.count(said) == 1
    assert not (tmp_path / "run").exists()
