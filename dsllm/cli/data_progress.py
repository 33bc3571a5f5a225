"""What is seen of a preparation while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from dsllm.units import format_count, format_duration

if TYPE_CHECKING:
    from dsllm.data.preparation.pipeline import Progress


LINE_INTERVAL_SECONDS = 30.0


@contextmanager
def progress_shown(what: str = "tokenizer") -> Iterator[Callable[[Progress], None]]:
    """What a preparation reports, on stderr: a bar on a terminal, a line now and then elsewhere. `what` it is at before
    it tokenizes, or where it does not."""
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as ProgressBar

    console = Console(stderr=True)
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    began: float | None = None
    last_line = time.perf_counter()
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def show(progress: Progress) -> None:
            nonlocal began, last_line
            now = time.perf_counter()
            if progress.done_bytes == 0 or began is None:
                began = now
            text = progress_text(progress, now - began, what)
            bar.update(task, description=text, completed=progress.done_bytes, total=progress.total_bytes)
            if bar.disable and now - last_line > LINE_INTERVAL_SECONDS:
                typer.echo(text, err=True)
                last_line = now

        yield show


def progress_text(progress: Progress, seconds: float, what: str = "tokenizer") -> str:
    """`12,000 documents, 9.3 MB/s, 2.1M tokens/s, 4 min left`, of a preparation that tokenizes since `seconds`;
    `joining, 4 min left` of work that makes no tokens."""
    if progress.done_bytes == 0:
        return what
    rate = max(seconds, 1e-3)
    text = (
        what
        if progress.documents == 0
        else (
            f"{progress.documents:,} documents, {progress.text_bytes / rate / 1e6:.1f} MB/s, "
            f"{format_count(progress.tokens / rate)} tokens/s"
        )
    )
    made_bytes = progress.done_bytes - progress.found_bytes
    if progress.total_bytes is None or made_bytes == 0:
        return text
    left_bytes = max(0, progress.total_bytes - progress.done_bytes)
    return f"{text}, {format_duration(left_bytes * rate / made_bytes)} left"
