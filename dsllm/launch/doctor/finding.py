"""What the doctor says of a host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "warned", "failed", "skipped"]
Check = Literal[
    "reach",
    "python",
    "versions",
    "dsllm",
    "spec",
    "GPUs",
    "processes",
    "memory",
    "host memory",
    "folder",
    "history",
    "space",
    "data",
    "clock",
    "port",
    "link",
]


@dataclass(frozen=True)
class Finding:
    """One check of one host."""

    host: str
    check: Check
    outcome: Outcome
    found: str
    """Figures and names, as short as they are clear."""
    remedy: str = ""
    """What to do about it; empty where it passed."""


def failures(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """What failed, by host."""
    failed: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.outcome == "failed":
            failed.setdefault(finding.host, []).append(finding)
    return failed


def usual(values: Mapping[str, str | None]) -> tuple[str | None, str]:
    """What most hosts have, the first host where two are as frequent, and one host that has it."""
    counts = Counter(values.values())
    value = max(counts, key=lambda value: counts[value])
    return value, next(host for host, own in values.items() if own == value)


def listed(names: Iterable[str], most: int = 5) -> str:
    """`a, b, c`, and a count of the rest of a long list."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
