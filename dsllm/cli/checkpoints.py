"""Commands on checkpoints: list, verify, convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dsllm.cli.models import quiet_libraries
from dsllm.cli.options import AsJson

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="List, verify and convert checkpoints.")

Run = Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.", show_default=False)]


@app.command("list", epilog="Example: dsllm checkpoints list runs/quickstart")
def list_checkpoints(run: Run, as_json: AsJson = False) -> None:
    """Show the checkpoints of a run: step, what wrote it, size, and which one a resume takes."""
    quiet_libraries()
    from dsllm.checkpoint.catalogue import checkpoints_of

    _print([entry.as_json() for entry in checkpoints_of(run)], as_json)


@app.command(epilog="Example: dsllm checkpoints verify runs/quickstart")
def verify(run: Run, as_json: AsJson = False) -> None:
    """Read every file of every checkpoint and compare it with its checksum. Exit status 1 where one is damaged."""
    quiet_libraries()
    from dsllm.checkpoint.catalogue import checkpoints_of
    from dsllm.checkpoint.verify import faults_of

    entries = [entry.as_json() | {"faults": faults_of(entry.folder)} for entry in checkpoints_of(run)]
    _print(entries, as_json)
    if any(entry["faults"] for entry in entries):
        raise typer.Exit(1)


@app.command(epilog="Example: dsllm checkpoints convert runs/quickstart --output /archive/quickstart")
def convert(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run (its latest checkpoint), or one checkpoint.", show_default=False)
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option(help="Folder to write; global_step<N>_universal beside the checkpoint when absent."),
    ] = None,
) -> None:
    """Convert a checkpoint to DeepSpeed's universal layout, which any stage and number of ranks loads.

    dsllm resumes anywhere without it. It is for keeping a state, and for other programs on DeepSpeed.
    """
    quiet_libraries()
    from dsllm.checkpoint.convert import convert as convert_checkpoint
    from dsllm.checkpoint.resume import checkpoint_at
    from dsllm.units import format_bytes

    checkpoint = checkpoint_at(run)
    with _progress_bar() as bar:
        target, manifest = convert_checkpoint(checkpoint, output, _on(bar))
    typer.echo(f"{target}: the state after {manifest.step} steps, {format_bytes(manifest.size_bytes)}, read back")
    typer.echo(f"go on from it with --resume {target}")


def _print(entries: list[dict[str, Any]], as_json: bool) -> None:
    from dsllm.cli.tables import print_table
    from dsllm.units import format_bytes

    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    verified = any("faults" in entry for entry in entries)
    columns = ["checkpoint", "step", "written by", "size", "", *(["state"] if verified else [])]
    rows = []
    for entry in entries:
        size = "" if entry["size_bytes"] is None else format_bytes(entry["size_bytes"])
        row = [entry["name"], str(entry["step"]), entry["origin"] or "not complete", size]
        row.append("latest" if entry["is_latest"] else "")
        if verified:
            row.append(_state(entry["faults"]))
        rows.append(row)
    print_table(columns, rows)


def _state(faults: list[str]) -> str:
    if not faults:
        return "sound"
    return faults[0] + (f", and {len(faults) - 1} more" if len(faults) > 1 else "")


def _progress_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("parameters"), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _on(bar: Progress) -> Callable[[int, int], None]:
    task = bar.add_task("", total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)
