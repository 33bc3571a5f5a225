"""What the doctor says of a host."""

from __future__ import annotations

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
    "memory",
    "host memory",
    "processes",
    "clock",
    "folder",
    "space",
    "data",
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


def bad_hosts(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """What failed, by host."""
    failed: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.outcome == "failed":
            failed.setdefault(finding.host, []).append(finding)
    return failed


def alike(
    values: Mapping[str, str | None], check: Check, what: str, remedy: str, outcome: Outcome = "failed"
) -> list[Finding]:
    """A finding for each host whose value is not the usual one: that of most hosts, of the first among equals.

    `remedy` may name `{usual}`, `{host}` and `{most}`, a host that has the usual one. None means that it is not there.
    """
    if not values:
        return []
    counts = {value: list(values.values()).count(value) for value in values.values()}
    usual = max(counts, key=lambda value: counts[value])
    most = next(host for host, value in values.items() if value == usual)
    return [
        Finding(
            host,
            check,
            outcome,
            f"{what} {_shown(value)}, {most} has {_shown(usual)}",
            remedy.format(usual=_shown(usual), host=host, most=most),
        )
        for host, value in values.items()
        if value != usual
    ]


def _shown(value: str | None) -> str:
    return "none" if value is None else value
