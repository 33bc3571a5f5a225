"""Commands about tokenizers alone: `dsllm tokenizer train`, `dsllm tokenizer report`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dsllm.cli.options import AsJson, Overrides, SkipBadLines, SpecArgument
from dsllm.units import format_text_bytes

if TYPE_CHECKING:
    from dsllm.data.compression import Compression
    from dsllm.spec.sections import Spec

app = typer.Typer(
    help="Train a tokenizer without preparing tokens, and compare tokenizers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(epilog="Example: dsllm tokenizer train quickstart --out tokenizers/python-4k")
def train(
    spec: SpecArgument,
    out: Annotated[
        Optional[Path],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option(
            "--out", metavar="FOLDER", help="Folder to write; tokenizers/<spec name> when absent.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = False,
) -> None:
    """Train the tokenizer of a spec on its sources, save it as a Hugging Face folder, and measure it on held-out text.

    It is the tokenizer that `dsllm data prepare` would make of the same spec.
    """
    _need_train_extra("tokenizer train")
    from dsllm.data.compression import held_out_texts, measure_compression
    from dsllm.data.preparation.recipe import held_out_threshold
    from dsllm.data.tokenizer import train_tokenizer
    from dsllm.spec.load import load_spec

    loaded = load_spec(spec, overrides or ())
    directory = out or Path("tokenizers") / loaded.name
    with _at_work(f"training {directory}"):
        threshold = held_out_threshold(loaded, skip_bad_lines=skip_bad_lines)
        num_tokens = train_tokenizer(loaded, directory, threshold, skip_bad_lines=skip_bad_lines)
    with _at_work("measuring it on held-out text"):
        texts = held_out_texts(loaded.data, threshold, skip_bad_lines=skip_bad_lines)
        measured = measure_compression(directory, texts)
    in_spec = {"tokenizer": {"kind": "pretrained", "name": str(directory)}, "model.vocab_size": num_tokens}
    if as_json:
        facts = {"directory": str(directory), "vocab_size": num_tokens, "in_spec": in_spec}
        typer.echo(json.dumps({**facts, "compression": measured and _facts(measured)}, indent=2))
        return
    typer.echo(f"{directory}: {num_tokens:,} tokens, {_way(loaded)}")
    _print_report([(str(directory), measured)])
    typer.echo(
        f"To use it, say in a spec:\n\n"
        f"tokenizer: {{kind: pretrained, name: {directory}}}\n"
        f"model:\n  vocab_size: {num_tokens}"
    )


@app.command(epilog="Example: dsllm tokenizer report tokenizers/python-4k gpt2 --spec quickstart")
def report(
    tokenizers: Annotated[
        list[str], typer.Argument(metavar="TOKENIZER...", help="Hugging Face folders, or names on the Hub.")
    ],
    spec: Annotated[
        str, typer.Option("--spec", metavar="SPEC", help="Spec on whose held-out text to compare.", show_default=False)
    ],
    overrides: Overrides = None,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = False,
) -> None:
    """Compare tokenizers on the same text: what a spec holds out of its sources, and its validation sources."""
    _need_train_extra("tokenizer report")
    from dsllm.data.compression import held_out_texts
    from dsllm.data.preparation.recipe import held_out_threshold
    from dsllm.spec.load import load_spec

    loaded = load_spec(spec, overrides or ())
    with _at_work("reading held-out text"):
        threshold = held_out_threshold(loaded, skip_bad_lines=skip_bad_lines)
        texts = list(held_out_texts(loaded.data, threshold, skip_bad_lines=skip_bad_lines))
    rows = [(name, _measured(name, texts)) for name in tokenizers]
    if as_json:
        typer.echo(json.dumps([{"tokenizer": name, **(_facts(row) if row else {})} for name, row in rows], indent=2))
    else:
        _print_report(rows)


def _measured(name: str, texts: Sequence[str]) -> Compression | None:
    """Of a tokenizer by folder or name, which is fetched where it has no tokenizer.json yet."""
    from tempfile import TemporaryDirectory

    from dsllm.data.compression import measure_compression
    from dsllm.data.token_ids import TOKENIZER_FILE
    from dsllm.data.tokenizer import fetch_tokenizer
    from dsllm.spec.sections import PretrainedTokenizer

    with _at_work(f"measuring {name}"), TemporaryDirectory() as folder:
        if (Path(name).expanduser() / TOKENIZER_FILE).is_file():
            return measure_compression(Path(name).expanduser(), texts)
        fetch_tokenizer(PretrainedTokenizer(kind="pretrained", name=name)).save_pretrained(folder)
        return measure_compression(folder, texts)


def _facts(measured: Compression) -> dict[str, Any]:
    from dataclasses import asdict

    rates = ("bytes_per_token", "tokens_per_word", "fallback_share", "used_share")
    return asdict(measured) | {rate: round(getattr(measured, rate), 6) for rate in rates}


def _print_report(rows: Sequence[tuple[str, Compression | None]]) -> None:
    from dsllm.cli.tables import print_table

    measured = [(name, row) for name, row in rows if row is not None]
    if not measured:
        typer.echo("nothing is held out of the text that was read; raise data.validation_fraction to have it measured")
        return
    first = measured[0][1]
    print_table(
        ["tokenizer", "tokens", "of them used", "bytes a token", "tokens a word", "byte fallback", "text comes back"],
        [(name, *_cells(row)) for name, row in measured],
        title=f"on {format_text_bytes(first.text_bytes)} of held-out text, {first.documents:,} documents",
    )


def _cells(row: Compression) -> tuple[str, ...]:
    return (
        f"{row.vocab_size:,}",
        f"{row.used_share:.1%}",
        f"{row.bytes_per_token:.3f}",
        f"{row.tokens_per_word:.3f}",
        f"{row.fallback_share:.3%}",
        "yes" if row.documents_returned == row.documents else f"of {row.documents_returned:,} documents",
    )


def _way(spec: Spec) -> str:
    """`sentencepiece bpe, trained on 4.0 MB at most`."""
    tokenizer: Any = spec.tokenizer
    algorithm = f" {tokenizer.algorithm}" if tokenizer.kind == "sentencepiece" else ""
    return f"{tokenizer.kind}{algorithm}, trained on {format_text_bytes(tokenizer.training_bytes)} at most"


@contextmanager
def _at_work(what: str) -> Iterator[None]:
    """A spinner on stderr."""
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def _need_train_extra(command: str) -> None:
    from importlib.util import find_spec

    from dsllm.cli.models import quiet_libraries
    from dsllm.errors import UserError

    if any(find_spec(name) is None for name in ("sentencepiece", "tokenizers", "transformers")):
        raise UserError(f"{command}: given on a machine without tokenizer libraries; pip install 'dsllm[train]'")
    quiet_libraries()
