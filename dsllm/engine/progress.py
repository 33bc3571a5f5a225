"""What a person sees of a run: a bar on a terminal, a line now and then elsewhere. Rank 0 only."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsllm.units import format_count, format_duration

logger = logging.getLogger(__name__)

LINE_INTERVAL_SECONDS = 10.0


class ProgressReport:
    """A sink for records that keeps the screen up to date."""

    def __init__(self, first_step: int, train_steps: int) -> None:
        self._train_steps = train_steps
        self._num_records = 0
        self._started = time.monotonic()
        self._last_line = float("-inf")
        console = Console(stderr=True)
        self._bar = _bar(console) if sys.stderr.isatty() else None
        if self._bar is not None:
            self._task = self._bar.add_task("", total=train_steps, completed=first_step)
            self._bar.start()

    def __call__(self, record: dict[str, Any]) -> None:
        """Show the step of `record`: the bar always, a line every ten seconds and at each answer, and samples."""
        self._num_records += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=_numbers(record))
        due = time.monotonic() - self._last_line >= LINE_INTERVAL_SECONDS
        has_answers = "val_loss" in record or "hellaswag_acc" in record
        if has_answers or (self._bar is None and due):
            self._last_line = time.monotonic()
            left = format_duration(self._seconds_left(record["step"]))
            logger.info("step %d/%d  %s  %s left", record["step"], self._train_steps, _numbers(record), left)
        for sample in record.get("samples", ()):
            logger.info("sample at step %d  %s", record["step"], _quoted(sample["prompt"] + sample["text"]))

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _seconds_left(self, step: int) -> float:
        each = (time.monotonic() - self._started) / self._num_records
        return each * (self._train_steps - step)


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), console=console
    )


def _quoted(text: str) -> str:
    """On one line, the ends of its own written as they are in programs."""
    return json.dumps(text, ensure_ascii=False)


def _numbers(record: dict[str, Any]) -> str:
    parts = [f"loss {record['loss']:.3f}"]
    if "val_loss" in record:
        by_label = ", ".join(f"{label} {loss:.3f}" for label, loss in record.get("val_losses", {}).items())
        parts.append(f"val {record['val_loss']:.3f}" + (f" ({by_label})" if by_label else ""))
    if "hellaswag_acc" in record:
        parts.append(f"HellaSwag {record['hellaswag_acc']:.1%} ({record['hellaswag_acc_norm']:.1%} normalized)")
    parts.append(f"{format_count(record['tokens_per_second'])} tokens/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    return "  ".join(parts)
