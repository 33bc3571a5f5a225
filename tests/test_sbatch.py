"""The batch script for Slurm: what it asks for, and that no name breaks it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllm.errors import UserError
from dsllm.launch.sbatch import dsllm_program, sbatch_script

PRINTABLE = st.text(st.characters(blacklist_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=20)
ANY_TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20)


def script(**changes: object) -> str:
    given: dict[str, object] = {
        "name": "my-run",
        "num_nodes": 2,
        "ranks_per_node": 8,
        "program": ["/env/bin/dsllm"],
        "launch_arguments": ["my.yaml", "--launcher", "slurm"],
        "working_folder": "/srv",
        "output_folder": "/srv/runs/my-run/logs",
    }
    return sbatch_script(**{**given, **changes})


def headers(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_a_job_has_a_task_and_a_gpu_for_each_rank_and_goes_on_when_requeued() -> None:
    assert headers(script()) == [
        "--job-name=my-run",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--output=/srv/runs/my-run/logs/slurm-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR2@300",
    ]
    assert script().splitlines()[-1] == "exec /env/bin/dsllm launch my.yaml --launcher slurm"


def test_ranks_on_the_cpu_ask_for_no_gpus() -> None:
    assert not any("gpu" in header for header in headers(script(on_cpu=True)))


def test_given_options_come_last_and_so_win() -> None:
    assert headers(script(options=["--time=4:00:00", "--exclusive"]))[-2:] == ["--time=4:00:00", "--exclusive"]


def test_headers_come_before_the_first_command() -> None:
    lines = script(options=["--qos=high"]).splitlines()
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines[0] == "#!/bin/bash"
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


def test_a_percent_sign_in_a_path_is_no_pattern_of_slurm() -> None:
    assert "--output=/a/100%%j/slurm-%j.log" in headers(script(output_folder="/a/100%j"))


def test_a_backslash_is_doubled_since_sbatch_reads_it_in_single_quotes_too() -> None:
    assert r"--job-name='a\\b'" in headers(script(name=r"a\b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a\nb"}, r"--write-sbatch: given 'a\nb' for job-name; must be text on one line"),
        ({"name": ""}, r"--write-sbatch: given '' for job-name; must be text on one line"),
        (
            {"options": ["qos=high"]},
            r"--write-sbatch: given 'qos=high'; must be an option of sbatch, such as --qos=high",
        ),
        ({"options": ["--a\nrm"]}, r"--write-sbatch: given '--a\nrm'; must be an option of sbatch"),
        ({"output_folder": "/a\\b"}, r"--run-dir: given '/a\b'; must be a path without a backslash"),
    ],
)
def test_what_cannot_stand_in_the_script_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        script(**changes)
    assert str(refusal.value).startswith(message)


@settings(max_examples=30, deadline=None)
@given(name=PRINTABLE, folder=PRINTABLE, arguments=st.lists(ANY_TEXT, max_size=4))
def test_no_name_or_argument_breaks_the_script(name: str, folder: str, arguments: list[str]) -> None:
    text = script(
        name=name,
        program=[sys.executable, "-c", "import sys, os; print([os.getcwd(), sys.argv[1:]])"],
        launch_arguments=arguments,
        output_folder="/logs/" + folder.replace("\\", ""),
        working_folder="/",
    )
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    ran = subprocess.run(["bash"], input=text, capture_output=True, text=True)
    assert ran.stdout == f"{['/', ['launch', *arguments]]}\n"
    assert len(headers(text)) == len(headers(script()))


@settings(max_examples=30, deadline=None)
@given(folder=PRINTABLE)
def test_a_working_folder_that_is_gone_ends_the_job(folder: str) -> None:
    text = script(program=["echo"], working_folder=f"/nowhere/{folder}")
    ran = subprocess.run(["bash"], input=text, capture_output=True, text=True)
    assert (ran.returncode != 0, ran.stdout) == (True, "")


def test_the_program_is_that_of_this_environment() -> None:
    program = dsllm_program()
    assert Path(program[0]).is_absolute()
    ran = subprocess.run([*program, "--version"], capture_output=True, text=True)
    assert ran.stdout.startswith("dsllm "), shlex.join(program)
