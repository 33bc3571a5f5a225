"""What Slurm's variables say of a job and of its steps: sbatch(1), srun(1), "OUTPUT ENVIRONMENT VARIABLES".

Every rank reads this before anything else is imported: of the standard library alone, and quick.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

from dsllm.errors import UserError

FIRST_SPECIAL_STEP = 0xFFFF_FFF0
"""From here on ids are not those of steps that srun was asked for, but the batch script's, salloc's shell's, ssh's
(slurm/slurm.h)."""
MOST_HOSTS = 65_536
"""That one element of a nodelist may name, as in Slurm."""

_FIRST_PORT = 10_000
_NUM_PORTS = 20_000
"""Below the ports that Linux hands out itself, from 32768."""
_ELEMENT = re.compile(r"(?:[^\[\],\s]|\[[^\[\]\s]*\])+")
_NODELIST = re.compile(f"{_ELEMENT.pattern}(?:,{_ELEMENT.pattern})*")
_RANGE = re.compile(r"(?P<first>[0-9]{1,18})(?:-(?P<last>[0-9]{1,18}))?")
_COUNT = re.compile(r"(?P<count>[0-9]{1,9})(?:\(x(?P<times>[0-9]{1,9})\))?")


def in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process, rather than a batch script, or the shell of an allocation."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < FIRST_SPECIAL_STEP


def rendezvous_port(environment: Mapping[str, str]) -> int:
    """A port for the ranks to meet at that two jobs on one node are unlikely to share, where none can be asked for.

    Raises UserError outside a Slurm job.
    """
    job = environment.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        raise UserError(f"SLURM_JOB_ID: given '{job}'; must be the number of a job; start the run inside a Slurm job")
    return _FIRST_PORT + int(job) % _NUM_PORTS


def expand_nodelist(text: str, source: str) -> list[str]:
    """The names in Slurm's short form: `node[01-02,7],gpu-[1-2]-ib` is node01, node02, node7, gpu-1-ib, gpu-2-ib.

    Raises UserError, which names `source`, where it is none.
    """
    if not _NODELIST.fullmatch(text):
        raise _no_nodelist(text, source)
    names: list[str] = []
    for element in _ELEMENT.findall(text):
        pieces = [_expand_piece(piece, text, source) for piece in re.split(r"(\[[^\]]*\])", element)]
        if math.prod(map(len, pieces)) > MOST_HOSTS:
            raise _no_nodelist(text, source)
        names += ["".join(parts) for parts in itertools.product(*pieces)]
    if len(set(names)) != len(names):
        raise UserError(f"{source}: given '{text}', which names a node twice; leave it as Slurm sets it")
    return names


def _expand_piece(piece: str, text: str, source: str) -> list[str]:
    """What stands in a pair of brackets, as `[01-03,7]`; plain text is itself."""
    if not piece.startswith("["):
        return [piece]
    numbers: list[str] = []
    for given in piece[1:-1].split(","):
        match = _RANGE.fullmatch(given)
        if match is None:
            raise _no_nodelist(text, source)
        first, last = match["first"], match["last"] or match["first"]
        if not 0 <= int(last) - int(first) < MOST_HOSTS:
            raise _no_nodelist(text, source)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _no_nodelist(text: str, source: str) -> UserError:
    return UserError(f"{source}: given '{text}'; must be a list of nodes such as node[01-03,7],gpu1")


def expand_counts(text: str) -> list[int]:
    """A number for each node, as in `8(x2),4`: 8, 8, 4; empty where the text is no such list."""
    matches = [_COUNT.fullmatch(part) for part in text.split(",")]
    runs = [(int(match["count"]), int(match["times"] or 1)) for match in matches if match]
    if len(runs) < len(matches) or sum(times for _, times in runs) > MOST_HOSTS:
        return []
    return [count for count, times in runs for _ in range(times)]
