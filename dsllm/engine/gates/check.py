"""What a check found, and what becomes of it: a line in the log, or the end of the run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsllm.engine import ranks
from dsllm.engine.run_folder import write_whole
from dsllm.errors import TrainingError
from dsllm.units import format_duration

logger = logging.getLogger(__name__)

SWITCH_OFF = "--set guards.step_0_checks=false trains without the checks"


@dataclass(frozen=True)
class Check:
    """One question put to a run before its first step, and its answer."""

    name: str
    passed: bool
    expected: str
    found: str
    remedy: str
    """What to do where it did not pass."""
    seconds: float = 0.0

    def sentence(self) -> str:
        """Of one that failed."""
        return f"{self.name}: expected {self.expected}; found {self.found}; {self.remedy}"

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "name": self.name,
            "passed": self.passed,
            "expected": self.expected,
            "found": self.found,
            "seconds": round(self.seconds, 2),
        }


def timed(checks: Iterator[Check]) -> Iterator[Check]:
    """The same checks, each with the seconds that it took to make."""
    started = time.perf_counter()
    for check in checks:
        yield replace(check, seconds=time.perf_counter() - started)
        started = time.perf_counter()


def conclude(checks: Sequence[Check], path: Path) -> None:
    """Write the answers to `path` and log one line, where all passed. Collective.

    Raises TrainingError, on every rank, where one did not.
    """
    ranks.on_rank_0(lambda: write_whole(path, json.dumps(_document(checks), indent=2) + "\n"))
    failed = [check for check in checks if not check.passed]
    if failed:
        raise TrainingError(_refusal(failed))
    names = ", ".join(check.name for check in checks)
    logger.info("checks  %s: passed in %s", names, format_duration(sum(check.seconds for check in checks)))


def _document(checks: Sequence[Check]) -> dict[str, Any]:
    return {
        "passed": all(check.passed for check in checks),
        "checks": [check.document() for check in checks],
    }


def _refusal(failed: Sequence[Check]) -> str:
    if len(failed) == 1:
        return f"check before the first step: {failed[0].sentence()}; {SWITCH_OFF}"
    lines = [f"{len(failed)} checks before the first step failed; {SWITCH_OFF}"]
    return "\n  ".join([*lines, *(check.sentence() for check in failed)])
