"""What ranks tell each other of themselves, and what follows from it: pure functions, for the watchdog to act on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from dsllm.errors import Cause
from dsllm.units import format_duration


class Finding(NamedTuple):
    """What is wrong with some rank."""

    cause: Cause
    reason: str
    ranks: tuple[int, ...]
    """Those it is about; none where all are alike."""


@dataclass(frozen=True)
class Report:
    """One rank at one moment."""

    rank: int
    host: str
    beat: int
    """Grows with every report, whatever the main thread does."""
    ticks: int = 0
    """Grows with what the main thread comes to."""
    step: int = 0
    phase: str = "starting"
    idle_seconds: float = 0.0
    """Since the last tick."""
    allowed_seconds: float = 0.0
    """What `idle_seconds` may be in this phase."""
    waits: bool = False
    """Whether it stands in a collective: it has come further than a rank with as many ticks that does not."""
    is_leaving: bool = False
    """It ends, and knows why: nobody needs to miss it or tell it."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        return cls(**json.loads(text))

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def place(self) -> str:
        """`step 3, backward`; before the first step the phase alone."""
        return f"step {self.step}, {self.phase}" if self.step else self.phase


def find_hang(reports: Sequence[Report]) -> Finding | None:
    """The rank that keeps the others waiting longer than it may, None where none does.

    That is the one which has come least far, so a rank ahead of it never counts as hanging, however long it waits.
    """
    furthest_back = min((report.ticks, report.waits) for report in reports)
    behind = [report for report in reports if (report.ticks, report.waits) == furthest_back]
    if any(report.is_leaving or report.idle_seconds < report.allowed_seconds for report in behind):
        return None
    idle = format_duration(min(report.idle_seconds for report in behind))
    if 1 < len(behind) == len(reports):
        reason = f"no rank has made progress for {idle}, and none is behind the others: {behind[0].place}"
        return Finding("hang", reason, ())
    names = ", ".join(report.name for report in behind)
    reason = f"{names}: no progress for {idle}, in {behind[0].place}; the other ranks wait"
    return Finding("hang", reason, tuple(report.rank for report in behind))
