"""What goes along to other hosts, and how: nothing of one process, every value whole, nothing in public."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsllm.errors import UserError
from dsllm.launch.environment import adopt, as_text, parse, read_deepspeed_env, selected

ROOT = Path(__file__).parent.parent
SECRET = "s3cret"

SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
if os.environ.get("HOLDS_BACK") == "first":  # as launch/supervisor.py does in what it starts
    os.environ["HOLDS_BACK"] = "done"
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
starts = os.environ["STARTS"]
with open(starts, "a") as file:
    file.write(f"{os.getpid()}\\n")
from dsllm.launch.environment import adopt
adopt(sys.argv[2])
print(json.dumps({
    "path": sys.path,
    "greeting": os.environ.get("DSLLM_GREETING"),
    "marker": os.environ.get("DSLLM_ENVIRONMENT_ADOPTED"),
    "arguments": sys.argv[3:],
    "unbuffered": "-u" in sys.orig_argv,
    "ignores": signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN,
    "blocks": signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, ()),
}))
"""

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True)
values = st.text(st.characters(exclude_characters="\0")) | st.binary().map(
    lambda raw: os.fsdecode(raw.replace(b"\0", b"")),
)


@pytest.fixture
def private(tmp_path: Path) -> Path:
    path = tmp_path / "environment"
    path.touch(0o600)
    return path


def start(private: Path, tmp_path: Path, **environment: str) -> tuple[dict[str, Any], list[str]]:
    """What a process that adopts the file has afterwards, and the process number of each of its starts."""
    (tmp_path / "script.py").write_text(SCRIPT)
    starts = tmp_path / "starts"
    result = subprocess.run(
        [sys.executable, "-u", tmp_path / "script.py", ROOT, private, "one", "two words"],
        env={**os.environ, "STARTS": str(starts), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout), starts.read_text().split()


def test_the_default_patterns_take_what_a_run_reads_and_nothing_of_one_process_or_host() -> None:
    taken = {
        "WANDB_API_KEY": SECRET,
        "HF_HOME": "/shared",
        "NCCL_DEBUG": "INFO",
        "DSLLM_DEBUG": "1",
        "PYTHONPATH": "/src",
        "MLFLOW_TRACKING_URI": "http://tracker",
        "OMP_NUM_THREADS": "4",
    }
    left = [
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "PYTHONHOME", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"),
        *("HOME", "PATH", "DSLLM_LAUNCH", "DSLLM_WORLD_SIZE", "DSLLM_ENVIRONMENT_ADOPTED", "TORCHELASTIC_RUN_ID"),
    ]
    assert selected({**taken, **dict.fromkeys(left, "1")}) == taken


def test_the_spec_allows_more_by_name_or_pattern_and_still_nothing_of_one_process() -> None:
    environment = {"AWS_KEY": "a", "AWS_REGION": "b", "MINE": "c", "mine": "d", "LOCAL_RANK": "1", "HOME": "/root"}
    assert selected(environment, ["AWS_*", "MINE", "LOCAL_*"]) == {"AWS_KEY": "a", "AWS_REGION": "b", "MINE": "c"}
    assert selected({**environment, "BASH_FUNC_f%%": "()"}, ["*"]) == {
        name: environment[name] for name in ("AWS_KEY", "AWS_REGION", "MINE", "mine")
    }


@given(st.dictionaries(names, values))
def test_every_value_comes_back_as_it_was(variables: dict[str, str]) -> None:
    text = as_text(variables)
    assert text.isascii()
    assert len(text.splitlines()) == len(variables)
    assert parse(text) == variables


@pytest.mark.parametrize("line", ["A", "A=s3cret", 'A B="s3cret"', '="s3cret"', "A=1", 'A="s3cret\\u0000"'])
def test_a_damaged_line_is_named_by_its_number_and_its_value_is_not_repeated(line: str) -> None:
    with pytest.raises(UserError, match=r"^FILE, line 2: no variable; a line is NAME=\"value\"") as refusal:
        parse(f'B="1"\n{line}\n', "FILE")
    assert SECRET not in str(refusal.value)


def test_deepspeeds_own_file_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    (home / ".deepspeed_env").write_text("A=1\nB=from=home \n")
    (here / ".deepspeed_env").write_text("\n# a comment\nB=two words\n")
    (here / "other").write_text("C=3\n")
    assert read_deepspeed_env(here, home, {}) == {"A": "1", "B": "two words"}
    assert read_deepspeed_env(here, home, {"DS_ENV_FILE": "other"}) == {"C": "3"}
    assert read_deepspeed_env(home, home, {"DS_ENV_FILE": str(here / "other")}) == {"C": "3"}
    assert read_deepspeed_env(tmp_path, tmp_path, {}) == {}


def test_a_line_of_deepspeeds_file_that_is_no_assignment_is_named(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("A=1\nexport s3cret\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env, line 2: no variable; a line is NAME=value") as refusal:
        read_deepspeed_env(tmp_path, tmp_path / "nowhere", {})
    assert SECRET not in str(refusal.value)


def test_a_process_starts_itself_once_more_with_what_only_a_start_reads(private: Path, tmp_path: Path) -> None:
    private.write_text(as_text({"DSLLM_GREETING": 'two\nlines and "quotes"', "PYTHONPATH": "/of/the/launch"}))
    after, starts = start(private, tmp_path, HOLDS_BACK="first")
    assert after["greeting"] == 'two\nlines and "quotes"'
    assert "/of/the/launch" in after["path"]
    assert after["arguments"] == ["one", "two words"]
    assert after["marker"] is None
    assert len(starts) == 2
    assert len(set(starts)) == 1, "the launcher knows it by its process number"
    assert after["ignores"]
    assert after["blocks"]
    assert after["unbuffered"]


def test_a_process_that_has_them_all_goes_on(private: Path, tmp_path: Path) -> None:
    private.write_text(as_text({"DSLLM_GREETING": "hello"}))
    after, starts = start(private, tmp_path, DSLLM_GREETING="hello")
    assert (after["greeting"], len(starts)) == ("hello", 1)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_may_read_or_write_is_refused(private: Path, mode: int) -> None:
    private.chmod(mode)
    with pytest.raises(UserError, match=f"with mode {mode:o}, which others may read; it can hold keys; chmod 600"):
        adopt(private)


def test_another_users_file_is_refused(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: private.stat().st_uid + 1)
    with pytest.raises(UserError, match="which is another user's; must be your own; let dsllm launch write it"):
        adopt(private)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which cannot be read: No such file or directory; let dsllm launch write it"):
        adopt(tmp_path / "nothing")


def test_a_file_that_is_no_text_is_refused(private: Path) -> None:
    private.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="which is not what dsllm launch writes"):
        adopt(private)


def test_train_takes_the_file_on_before_it_imports_anything_that_it_might_point_to(
    private: Path, tmp_path: Path
) -> None:
    """A pydantic of its own, in the folder that PYTHONPATH of the file names."""
    (tmp_path / "libraries" / "pydantic").mkdir(parents=True)
    (tmp_path / "libraries" / "pydantic" / "__init__.py").write_text("raise SystemExit('this pydantic')")
    private.write_text(as_text({"PYTHONPATH": str(tmp_path / "libraries")}))
    command = [sys.executable, ROOT / "dsllm/train.py", "--spec", "quickstart", "--environment-file", private]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr.strip()) == (1, "this pydantic")


def test_train_says_in_one_line_what_is_wrong_with_the_file(private: Path, tmp_path: Path) -> None:
    private.chmod(0o644)
    command = [sys.executable, ROOT / "dsllm/train.py", "--spec", "quickstart", "--environment-file", private]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"--environment-file: given '{private}' with mode 644")
    assert result.stderr.count("\n") == 1
