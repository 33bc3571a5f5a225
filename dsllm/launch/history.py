"""`runs/<name>/history.jsonl`: what happened to a run, one JSON object a line, for good.

Every event has `time` (UTC, ISO 8601), `event` and `step` (steps done); the rest depends on the event. Lines are only
ever appended, each with one write, so that a supervisor beside the run can write to the same file.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class History:
    """Appends to the history of a run, on rank 0; the other ranks write nothing."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._path = path
        self._writes = writes

    def append(self, event: str, step: int, **details: Any) -> None:
        """Write one event; it is on the disk when this returns."""
        if self._writes:
            append_event(self._path, {"time": _now(), "event": event, "step": step, **details})


def append_event(path: Path, event: Event) -> None:
    """Add one line, durably. What a killed process left of its last line stays behind, on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (b"\n" if is_torn else b"") + json.dumps(event).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_history(path: Path) -> list[Event]:
    """Every event, oldest first; none where there is no file. Lines that a killed process left unfinished are no
    events."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [event for event in map(_parsed, lines) if event is not None]


def skipped_batches(events: list[Event]) -> tuple[int, ...]:
    """The batches of the global order that the run leaves out: what its last event that names any says."""
    told = [event["skipped_batches"] for event in events if "skipped_batches" in event]
    return tuple(told[-1]) if told else ()


def num_roll_backs(events: list[Event]) -> int:
    """How often the run went back to a checkpoint because of a spike."""
    return sum(event["event"] == "rolled_back" for event in events)


def _parsed(line: str) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
