"""The line that follows a preparation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dsllm.units import format_count, format_duration

if TYPE_CHECKING:
    from dsllm.data.pipeline import Progress


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr: share of the input, MB/s of text, tokens/s, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as ProgressBar

    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    began: float | None = None
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizer", total=None)

        def show(progress: Progress) -> None:
            nonlocal began
            if progress.done_bytes == 0 or began is None:
                began = time.perf_counter()
            seconds = time.perf_counter() - began
            bar.update(
                task,
                description=progress_text(progress, seconds),
                completed=progress.done_bytes,
                total=progress.total_bytes,
            )

        yield show


def progress_text(progress: Progress, seconds: float) -> str:
    """`12,000 documents, 9.3 MB/s, 2.1M tokens/s, 4 min left`, of a preparation that tokenizes since `seconds`."""
    if progress.done_bytes == 0:
        return "tokenizer"
    rate = max(seconds, 1e-3)
    text = (
        f"{progress.documents:,} documents, {progress.text_bytes / rate / 1e6:.1f} MB/s, "
        f"{format_count(progress.tokens / rate)} tokens/s"
    )
    made_bytes = progress.done_bytes - progress.found_bytes
    if progress.total_bytes is None or made_bytes == 0:
        return text
    left_bytes = max(0, progress.total_bytes - progress.done_bytes)
    return f"{text}, {format_duration(left_bytes * rate / made_bytes)} left"
