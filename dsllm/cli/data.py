"""Commands about text and tokens: `dsllm data prepare`, `dsllm data inspect`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dsllm.cli.options import AsJson, Overrides, SpecArgument

if TYPE_CHECKING:
    from dsllm.data.prepare import Progress
    from dsllm.data.shards import Manifest

SAMPLE_TOKENS = 200

app = typer.Typer(
    help="Prepare text as tokens, and look at what is prepared.", no_args_is_help=True, rich_markup_mode=None
)


@app.command(epilog="Example: dsllm data prepare quickstart --processes 2")
def prepare(
    spec: SpecArgument,
    overrides: Overrides = None,
    processes: Annotated[
        Optional[int],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option("--processes", min=1, help="Processes that tokenize; the cores when absent.", show_default=False),
    ] = None,
) -> None:
    """Make the tokenizer and the token shards of a spec; what is already there is reused."""
    from dsllm.data.prepare import default_directory
    from dsllm.data.prepare import prepare as prepare_data
    from dsllm.spec.load import load_spec

    loaded = load_spec(spec, overrides or ())
    directory = default_directory(loaded)
    with _progress_line() as show:
        manifest = prepare_data(loaded, directory, processes=processes, on_progress=show)
    typer.echo(f"{directory}: {_summary(manifest)}")


@app.command(epilog="Example: dsllm data inspect data/quickstart --verify")
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="SPEC|FOLDER", help="A prepared folder, or the spec that it was prepared from.")
    ],
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file again and compare checksums.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a prepared folder holds: counts, and a decoded piece of the training text."""
    from dsllm.data.shards import read_manifest
    from dsllm.data.shards import verify as verify_shards

    directory = _prepared_directory(target, overrides or [])
    manifest = read_manifest(directory)
    if verify:
        verify_shards(directory)
    facts = _facts(directory, manifest)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print_facts(facts, manifest, verify)


def _prepared_directory(target: str, overrides: list[str]) -> Path:
    if Path(target).is_dir():
        return Path(target)
    from dsllm.data.prepare import default_directory
    from dsllm.spec.load import load_spec

    return default_directory(load_spec(target, overrides))


def _facts(directory: Path, manifest: Manifest) -> dict[str, Any]:
    from dsllm.data.shards import TOKENIZER_DIRECTORY, TokenShards, manifest_hash
    from dsllm.data.tokenizer import load_tokenizer

    start = TokenShards.open(directory, "train")
    tokens = start.read(0, min(SAMPLE_TOKENS, len(start)))
    return {
        "directory": str(directory),
        "manifest_sha256": manifest_hash(directory),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "text_bytes": manifest.text_bytes,
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "sources": [source.model_dump() for source in manifest.sources],
        "splits": {name: _split_facts(directory, manifest, name) for name in manifest.splits},
        "sample": load_tokenizer(directory / TOKENIZER_DIRECTORY).decode(tokens.tolist()),
    }


def _split_facts(directory: Path, manifest: Manifest, split: Any) -> dict[str, int]:
    """Counts of a split; lengths are in tokens, end-of-text included."""
    from itertools import pairwise

    from dsllm.data.shards import TokenShards

    shards = TokenShards.open(directory, split)
    starts = shards.document_starts().tolist()
    return {
        "documents": len(starts),
        "tokens": len(shards),
        "shards": len(manifest.splits[shards.split].shards),
        "longest_document_tokens": max(end - start for start, end in pairwise([*starts, len(shards)])),
    }


def _print_facts(facts: dict[str, Any], manifest: Manifest, verified: bool) -> None:
    from dsllm.cli.tables import print_table

    typer.echo(f"{facts['directory']}: {_summary(manifest)}")
    print_table(
        ["split", "documents", "tokens", "shards", "longest document"],
        [
            (
                name,
                f"{split['documents']:,}",
                f"{split['tokens']:,}",
                str(split["shards"]),
                f"{split['longest_document_tokens']:,} tokens",
            )
            for name, split in facts["splits"].items()
        ],
    )
    for source in manifest.sources:
        typer.echo(f"{source.source}: {source.documents:,} documents, {source.text_bytes / 1e6:,.1f} MB")
    if verified:
        typer.echo("every file is as it was prepared")
    typer.echo(f"\nThe training text begins:\n{facts['sample']}")


def _summary(manifest: Manifest) -> str:
    from dsllm.units import format_count

    train, validation = (manifest.splits[split].tokens for split in ("train", "validation"))
    return (
        f"{manifest.documents:,} documents, {manifest.text_bytes / 1e6:,.1f} MB, {format_count(manifest.tokens)} "
        f"tokens ({format_count(train)} to train on, {format_count(validation)} held out), "
        f"{manifest.vocab_size:,} in the vocabulary, {manifest.text_bytes / manifest.tokens:.2f} bytes a token"
    )


@contextmanager
def _progress_line() -> Iterator[Callable[[Progress], None]]:
    """A line on stderr that follows the preparation: documents, MB/s, tokens/s."""
    from rich.console import Console
    from rich.progress import Progress as ProgressBar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    began: float | None = None
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizer")

        def show(progress: Progress) -> None:
            nonlocal began
            if progress.documents == 0 or began is None:
                began = time.perf_counter()
            bar.update(task, description=_progress_text(progress, time.perf_counter() - began))

        yield show


def _progress_text(progress: Progress, seconds: float) -> str:
    if progress.documents == 0:
        return "tokenizer"
    from dsllm.units import format_count

    rate = max(seconds, 1e-3)
    return (
        f"{progress.documents:,} documents, {progress.text_bytes / rate / 1e6:.1f} MB/s, "
        f"{format_count(progress.tokens / rate)} tokens/s"
    )
