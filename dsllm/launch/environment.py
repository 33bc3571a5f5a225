"""The variables that a run takes to every host: which ones, and the private file that carries them.

They may hold keys, so they never stand on a command line, in a log or in the passport. The launch writes them into a
file that its user alone can read; train.py, given `--environment-file`, takes them on before it imports what reads
them. Nothing but the standard library is needed here: the file may say where all else is found.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsllm.errors import UserError

LAUNCH = "DSLLM_LAUNCH"
"""The number of this launch, which is another one for every attempt; set by `dsllm launch` alone."""

DEFAULT_PATTERNS = (
    "WANDB_*",
    "HF_*",
    "NCCL_*",
    "DSLLM_*",
    "GLOO_*",
    "TORCH_*",
    "OMP_*",
    # what DeepSpeed itself takes along (deepspeed/launcher/runner.py, EXPORT_ENVS)
    "PYTHON*",
    "MV2*",
    "UCX*",
    "MLFLOW*",
)
"""What goes along unasked."""

NEVER = (
    # the place of one process, its job and its launch
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "CROSS_RANK",
    "ROLE_*",
    "*WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_SIZE",
    "MASTER_*",
    "TORCHELASTIC_*",
    "SLURM*",
    "SRUN_*",
    "SBATCH_*",
    "OMPI_*",
    "PMI_*",
    "PMIX_*",
    "MPI_LOCAL*",
    "MV2_COMM_*",
    LAUNCH,
    "DSLLM_ENVIRONMENT_*",
    # devices are chosen on each host
    "CUDA_VISIBLE_DEVICES",
    # the interpreter, and the server of one process; too late for them, or wrong elsewhere
    "PYTHONHOME",
    "PYTHONEXECUTABLE",
    "PYTHONINSPECT",
    "WANDB_SERVICE",
    # of one host, login or shell
    "HOME",
    "HOSTNAME",
    "PWD",
    "OLDPWD",
    "SHLVL",
    "_",
    "SSH_*",
    "XDG_RUNTIME_DIR",
    "XDG_SESSION_*",
)
"""What never does, whatever a pattern says: it belongs to one process or host."""

ADOPTED = "DSLLM_ENVIRONMENT_ADOPTED"
"""Set while a process starts itself again with what it has adopted, so that it does so once."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def selected(environment: Mapping[str, str], allowed: Sequence[str] = ()) -> dict[str, str]:
    """The variables of `environment` that go along: by the default patterns, and by `allowed`, the spec's own."""
    patterns = (*DEFAULT_PATTERNS, *allowed)
    return {
        name: value
        for name, value in environment.items()
        if _NAME.fullmatch(name) and _is_any(name, patterns) and not _is_any(name, NEVER)
    }


def as_text(variables: Mapping[str, str]) -> str:
    """The content of the private file: a line `NAME="value"` each, the value as JSON, which keeps it on one line."""
    assert all(_NAME.fullmatch(name) for name in variables), "names come from `selected` or from dsllm itself"
    return "".join(f"{name}={json.dumps(value)}\n" for name, value in variables.items())


def parse(text: str, source: str = "environment") -> dict[str, str]:
    """What `as_text` wrote. Raises UserError with the number of a line that is none of it, and without its value."""
    variables = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        name, _, value = line.partition("=")
        try:
            content = json.loads(value)
        except ValueError:
            content = None
        if not _NAME.fullmatch(name) or not isinstance(content, str) or "\0" in content:
            raise UserError(
                f'{source}, line {number}: no variable; a line is NAME="value", the value as JSON; '
                "let dsllm launch write the file"
            )
        variables[name] = content
    return variables


def read_deepspeed_env(cwd: Path, home: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What DeepSpeed would read from `.deepspeed_env`, or the file that DS_ENV_FILE names, in the home and the current
    folder, the latter last (deepspeed/launcher/runner.py).

    DeepSpeed puts the values on the command lines of pdsh; here they can travel privately. Empty lines and comments are
    left out, at which DeepSpeed would fail. Raises UserError with the number of a line of another form.
    """
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    variables: dict[str, str] = {}
    for file in (home / name, cwd / name):
        if file.is_file():
            variables |= _read_assignments(file)
    return variables


def adopt(path: str | Path) -> None:
    """Make the variables of a private file this process's own, and start it again with them, in its place.

    Python and the system's loader read PYTHONPATH, LD_LIBRARY_PATH and OMP_* when a process starts, so setting them
    would be too late. Process number, signal mask, ignored signals and open streams stay. Where the process has all
    of them already, it goes on.

    Raises UserError where the file is missing, is another user's or can be read by one, or is damaged.
    """
    variables = parse(_read_privately(Path(path)), str(path))
    was_started_again = os.environ.pop(ADOPTED, None) is not None
    if was_started_again or all(os.environ.get(name) == value for name, value in variables.items()):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # By its full path twice: Python looks for its libraries beside what the first argument names.
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **variables, ADOPTED: "1"})


def discard(path: str | Path) -> None:
    """Remove a private file that every rank of this host has adopted; another one of them may have been faster."""
    with contextlib.suppress(OSError):
        Path(path).unlink()


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _read_assignments(file: Path) -> dict[str, str]:
    variables = {}
    for number, line in enumerate(file.read_text(errors="surrogateescape").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, separator, value = (part.strip() for part in line.partition("="))
        if not separator or not _NAME.fullmatch(name):
            raise UserError(f"{file}, line {number}: no variable; a line is NAME=value; mend it or remove it")
        variables[name] = value
    return variables


def _read_privately(path: Path) -> str:
    """The text of a file of this user's that nobody else may read; the file that is looked at is the one read."""
    try:
        with path.open(encoding="ascii") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid():
                raise UserError(
                    f"--environment-file: given '{path}', which is another user's; must be your own; "
                    "let dsllm launch write it"
                )
            if status.st_mode & 0o077:
                raise UserError(
                    f"--environment-file: given '{path}' with mode {stat.S_IMODE(status.st_mode):03o}, which others "
                    "may read; it can hold keys; chmod 600"
                )
            return file.read()
    except OSError as error:
        raise UserError(
            f"--environment-file: given '{path}', which cannot be read: {error.strerror}; let dsllm launch write it"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--environment-file: given '{path}', which is not what dsllm launch writes") from error
