"""Why the ranks of a launch ended, and whether starting them again can help."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsllm.launch.hosts import SSH_FAILED, HostError

CURABLE = frozenset({"lost_host", "lost_rank", "communication", "hang", "fault"})
"""What may not come again. The other causes would: memory that is too small, numbers that are not finite on the same
samples, a full disk, a user's mistake."""
GOES_ON = "; the same command goes on from the last checkpoint"
"""What a rank's verdict on another one ends with."""
SHELLS_SIGNALS = 128
"""A shell tells of a signal as 128 plus its number; DeepSpeed's launcher exits with minus the number, modulo 256."""


@dataclass(frozen=True)
class Signs:
    """What is known of ranks that have ended."""

    statuses: Sequence[int]
    """Exit statuses of the commands that started them; negative for a signal."""
    exits: Mapping[str, int] = field(default_factory=dict)
    """Exit status by host, where a host's own is known."""
    lost: Sequence[HostError] = ()
    """Hosts that can no longer be asked."""
    words: Sequence[Mapping[str, Any]] = ()
    """What ranks wrote when they failed (`logs/rank<r>.ended.json`), first those that failed by themselves."""
    asked_by: str | None = None
    """The signal that asked the run to end, if one did."""
    says: Ending | None = None
    """What the run itself says of its end, once it has come to one: `finished`, or `stopped`."""


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    cause: str
    """`finished`; `stopped` in a checkpoint; `interrupted`, which is stopped without one; or one of `errors.Cause`."""
    message: str
    rank: int | None = None
    """The rank that failed first, where it is known."""
    host: str | None = None
    """Where it failed."""
    was_asked: bool = False
    """Whether somebody had asked for the end, so that none may start it again."""
    was_ready: bool = True
    """Whether ranks were started at all."""

    @property
    def is_good(self) -> bool:
        return self.cause in ("finished", "stopped")

    @property
    def is_curable(self) -> bool:
        return self.cause in CURABLE and not self.was_asked

    @property
    def exit_status(self) -> int:
        return 0 if self.is_good else 2 if self.cause == "user_error" else 1


def find_ending(signs: Signs) -> Ending:
    """What the signs say together: evidence that a host or a process is gone comes before what others make of it.

    Only the run can say that it has come to its end: DeepSpeed's launcher ends with 0 where a signal has ended it.
    """
    if signs.says is not None and not any(signs.statuses) and not any(signs.exits.values()):
        return signs.says
    return replace(_bad_ending(signs), was_asked=signs.asked_by is not None)


def _bad_ending(signs: Signs) -> Ending:
    own = next((word for word in signs.words if word["is_own"]), None)
    if own is not None and own["cause"] not in ("lost_host", "lost_rank", "communication"):
        return Ending(own["cause"], _fact(own), own["rank"], own["host"])
    if signs.asked_by is not None:
        return Ending("interrupted", f"{signs.asked_by} ended it before the ranks could save")
    return _lost_host(signs) or _killed_rank(signs) or _told(signs) or _silent(signs)


def _lost_host(signs: Signs) -> Ending | None:
    """A host to which no way leads any more."""
    if signs.lost:
        error = signs.lost[0]
        return Ending("lost_host", f"the way to {error.host} is gone: {error.words}", host=error.host)
    for host, status in signs.exits.items():
        if status == SSH_FAILED:
            return Ending("lost_host", f"the way to {host} is gone: ssh lost the connection", host=host)
    return None


def _killed_rank(signs: Signs) -> Ending | None:
    """A rank that a signal ended, as the launcher on its host tells it."""
    killed = {host: number for host, status in signs.exits.items() if (number := signal_of(status)) is not None}
    if not killed:
        return None
    word = next((word for word in signs.words if word["cause"] in ("lost_rank", "lost_host")), None)
    rank, named = _culprit(word) if word is not None else (None, None)
    host = named if named in killed else next(iter(killed))
    what = f"{killed[host].name} ended a rank on {host}"
    return Ending("lost_rank", f"{what} ({_fact(word)})" if word is not None else what, rank, host)


def signal_of(status: int) -> signal.Signals | None:
    """The signal that an exit status tells of, if any."""
    for number in (-status, 256 - status, status - SHELLS_SIGNALS):
        if number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGTERM):
            return signal.Signals(number)
    return None


def _told(signs: Signs) -> Ending | None:
    """What a rank wrote, of itself or of another."""
    if not signs.words:
        return None
    word = signs.words[0]
    return Ending(word["cause"], _fact(word), *_culprit(word))


def _fact(word: Mapping[str, Any]) -> str:
    """Without the advice that a rank ends with, which the supervisor may follow itself."""
    return str(word["message"]).removesuffix(GOES_ON)


def _culprit(word: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """The rank that the words are about, and its host."""
    if word["is_own"]:
        return word["rank"], word["host"]
    named = re.match(r"rank (\d+) on ([^ :]+):", word["message"])
    return (int(named[1]), named[2]) if named else (None, None)


def _silent(signs: Signs) -> Ending:
    """No rank wrote a word: it did not come so far."""
    failed = {host: status for host, status in signs.exits.items() if status}
    host = next(iter(failed), None)
    status = failed[host] if host is not None else next((status for status in signs.statuses if status), 0)
    number = signal_of(status)
    if number is not None:
        return Ending("lost_rank", f"{number.name} ended a rank", host=host)
    if status == 2:
        return Ending("user_error", "a rank ended with status 2; what it said is above", host=host)
    return Ending("fault", f"the launcher ended with status {status}, and no rank said why", host=host)
