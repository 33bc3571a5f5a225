"""The command that makes a deeper or a shallower model of an existing one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from dsllm.cli.models import quiet_libraries
from dsllm.cli.options import AsJson


def grow(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder, or a name on the Hub.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to write, as a plain Hugging Face one.", show_default=False)],
    layers: Annotated[
        str, typer.Option(metavar="RANGES", help="Layers to take, counted from 0, in order.", show_default=False)
    ],
    revision: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option(help="Branch, tag or commit on the Hub."),
    ] = None,
    max_shard_gb: Annotated[
        float, typer.Option(min=0.001, help="Weights above so many GB (1e9 bytes) go into several files.")
    ] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Make a deeper or a shallower model of an existing one's layers, and say what came from where.

    Embeddings, final norm, head and tokenizer are carried over; every tensor is read back and compared. In training the
    same is done by model.init.

    Example: dsllm grow out/quickstart out/deeper --layers 0-4,1-5
    """
    quiet_libraries()
    from dsllm.cli.tables import print_table
    from dsllm.model.grow import grow as grow_model

    parts, unused = grow_model(source, output, layers, revision=revision, max_shard_bytes=round(max_shard_gb * 1e9))
    if unused:
        typer.echo(f"{source}: {len(unused)} tensors are no part of its model, first {unused[0]}; left out", err=True)
    if as_json:
        typer.echo(json.dumps([part._asdict() for part in parts], indent=2))
        return
    rows = [(part.name, part.origin, str(part.tensors), f"{part.parameters:,}") for part in parts]
    print_table([str(output), f"from {source}", "tensors", "parameters"], rows)
    total = sum(part.parameters for part in parts)
    typer.echo(f"{output}: {total:,} parameters, read back, and each tensor is the source's")
