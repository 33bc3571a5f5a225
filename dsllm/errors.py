"""What dsllm raises at its users: the command line prints the message as it is and exits with `exit_code`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Cause = Literal[
    "user_error", "out_of_memory", "non_finite", "lost_host", "lost_rank", "hang", "communication", "disk", "fault"
]
"""Why a run ended before its time: a mistake of the user's; memory, of a device or host; numbers; a rank that is not
heard of; one whose process ended without a word; one that makes no progress; NCCL, gloo or the network; a disk that is
full or cannot be written; anything else."""


class DsllmError(Exception):
    """A fault that stopped dsllm: the message says what happened and what to do about it."""

    exit_code = 1
    cause: Cause = "fault"

    def __init__(self, message: str = "", *, cause: Cause | None = None, is_own: bool = True) -> None:
        """`cause` where the kind of error does not say it already."""
        super().__init__(message)
        if cause is not None:
            self.cause = cause
        self.is_own = is_own
        """Whether it arose on this rank, rather than was told by another one."""


class UserError(DsllmError):
    """A mistake that the user can mend: what was given, what the rule is, what to change."""

    exit_code = 2
    cause = "user_error"


class SpecError(UserError):
    """Every problem of one spec. `problems` holds a complete sentence for each."""

    def __init__(self, problems: Sequence[str], source: str = "spec") -> None:
        self.problems = list(problems)
        self.source = source
        if len(self.problems) == 1:
            message = f"{source}: {self.problems[0]}"
        else:
            lines = [f"{source}: {len(self.problems)} problems", *(f"  {problem}" for problem in self.problems)]
            message = "\n".join(lines)
        super().__init__(message)


class DataError(UserError):
    """A text source, a tokenizer or a token shard that cannot be used as it is."""


class CheckpointError(DsllmError):
    """A checkpoint that could not be written or read. Earlier checkpoints are untouched."""


class TrainingError(DsllmError):
    """A run that cannot go on, with the reason."""


class OneRankError(TrainingError):
    """A fault that meets one rank alone, which therefore says it itself; the message names the rank."""


def first_line(error: BaseException) -> str:
    """Of what another library says, without its full stop; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """All of what another library says, which may be several lines; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
