"""A batch script for Slurm that starts `dsllm launch` on the first node of a job, which starts the ranks with srun.

Options are those of sbatch(1).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dsllm.errors import UserError

SECONDS_TO_SAVE = 300
"""Between the signal that ends the run in a checkpoint and the end of the job: a step, a save, and some room."""


def sbatch_script(
    *,
    name: str,
    num_nodes: int,
    ranks_per_node: int,
    program: Sequence[str],
    launch_arguments: Sequence[str],
    working_folder: str | Path,
    output_folder: str | Path,
    on_cpu: bool = False,
    options: Sequence[str] = (),
) -> str:
    """The script's text.

    `program` is the `dsllm` to run, as `dsllm_program` finds it; `launch_arguments` follow its `launch`, run in
    `working_folder`. `output_folder` is an absolute path, and has to exist when the job starts: Slurm makes none, and a
    job without it fails without a word. `options` are further ones such as `--time=4:00:00`; they win over those here.
    Without a time limit the partition's own holds.

    Raises UserError where a name cannot stand in a line of the script, or an option is none.
    """
    lines = [
        "#!/bin/bash",
        _option("job-name", name),
        _option("nodes", str(num_nodes)),
        "# A task and a GPU for each rank: this script is one process, but its steps have no more than the job has.",
        _option("ntasks-per-node", str(ranks_per_node)),
        *([] if on_cpu else [_option("gpus-per-node", str(ranks_per_node))]),
        "# The log goes on where a job that is requeued does.",
        _option("output", f"{_without_patterns(str(output_folder))}/slurm-%j.log"),
        _option("open-mode", "append"),
        "# Where a node fails or the job is preempted, Slurm starts this script again, and the run goes on by itself.",
        "#SBATCH --requeue",
        f"# {SECONDS_TO_SAVE} s before the end, to dsllm alone, which tells the ranks: they save and end.",
        f"#SBATCH --signal=B:USR2@{SECONDS_TO_SAVE}",
        *(f"#SBATCH {_checked_option(option)}" for option in options),
        "",
        "# A run that takes several jobs: sbatch this file so many times with --dependency=singleton. Each job goes on",
        "# from the newest checkpoint, and one that finds the run finished ends at once.",
        "set -euo pipefail",
        "",
        "# Where it cannot, Slurm's own --chdir would go on in /tmp.",
        f"cd -- {shlex.quote(str(working_folder))}",
        "# exec: Slurm signals the process of this script, which is dsllm from here on.",
        f"exec {shlex.join([*program, 'launch', *launch_arguments])}",
    ]
    return "\n".join(lines) + "\n"


def dsllm_program() -> list[str]:
    """The `dsllm` of this Python's environment, by its path, which holds on every node that shares it."""
    beside = Path(sys.executable).parent / "dsllm"
    return [str(beside)] if beside.is_file() else [sys.executable, "-m", "dsllm.cli.app"]


def _option(name: str, value: str) -> str:
    """A line of the header. sbatch reads quotes as a shell does, but a backslash in single quotes too."""
    if not value or not value.isprintable():
        raise UserError(
            f"--write-sbatch: given {value!r} for {name}; must be text on one line, without control characters"
        )
    escaped = value.replace("\\", "\\\\")
    return f"#SBATCH --{name}={shlex.quote(escaped)}"


def _checked_option(option: str) -> str:
    if not option.startswith("-") or not option.isprintable():
        raise UserError(f"--write-sbatch: given {option!r}; must be an option of sbatch, such as --qos=high")
    return option


def _without_patterns(path: str) -> str:
    """With each `%` doubled: Slurm would take `%j` in a path for the number of the job.

    Raises UserError for a backslash, which to Slurm means that there are no patterns at all.
    """
    if "\\" in path:
        raise UserError(
            f"--run-dir: given '{path}'; must be a path without a backslash, in which Slurm can write a log"
        )
    return path.replace("%", "%%")
