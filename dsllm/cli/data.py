"""Commands about prepared text: `dsllm data prepare`, `dsllm data merge`, `dsllm data inspect`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from dsllm.cli.options import AsJson, Overrides, SpecArgument

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
    shard: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Prepare only the I-th of N parts, for one of N machines; `dsllm data merge` joins them.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="Folder of the part; `<data folder>.parts/I-of-N` when absent.", show_default=False),
    ] = None,
    skip_bad_lines: Annotated[
        bool,
        typer.Option("--skip-bad-lines", help="Leave out lines of JSON files that cannot be read, and count them."),
    ] = False,
) -> None:
    """Make the tokenizer and the token shards of a spec; what is already there is reused.

    Interrupted at any moment, the same command goes on where it stopped and ends with the same bytes.
    """
    from dsllm.cli.data_progress import progress_shown
    from dsllm.cli.data_report import summary
    from dsllm.data.preparation.parts import parse_part, part_directory, prepare_part
    from dsllm.data.prepare import default_directory
    from dsllm.data.prepare import prepare as prepare_data
    from dsllm.errors import UserError
    from dsllm.spec.load import load_spec

    loaded = load_spec(spec, overrides or ())
    directory = default_directory(loaded)
    if shard is None:
        if out is not None:
            raise UserError(f"--out: given {out} without --shard; the whole goes to data.directory; use --set for that")
        with progress_shown() as show:
            manifest = prepare_data(
                loaded, directory, processes=processes, skip_bad_lines=skip_bad_lines, on_progress=show
            )
        typer.echo(f"{directory}: {summary(manifest)}")
        return
    part = parse_part(shard)
    folder = out or part_directory(directory, part)
    with progress_shown() as show:
        record = prepare_part(
            loaded, folder, part, processes=processes, skip_bad_lines=skip_bad_lines, on_progress=show
        )
    typer.echo(
        f"{folder}: part {part.number} of {part.of}, {len(record.pieces)} of {record.num_pieces} pieces; "
        f"once all parts are there, {_merge_hint(spec, overrides or (), out)}"
    )


def _merge_hint(spec: str, overrides: Sequence[str], out: Path | None) -> str:
    """The command that joins the parts, as it can be pasted; where a folder was chosen, only the user knows those of
    the other parts."""
    words = ["dsllm", "data", "merge", spec]
    for override in overrides:
        words += ["--set", override]
    if out is None:
        return f"{shlex.join(words)} joins them"
    return f"name the folder of each to join them: {shlex.join([*words, str(out)])}"


@app.command(epilog="Example: dsllm data merge my.yaml part-1 part-2")
def merge(
    spec: SpecArgument,
    folders: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(
            metavar="[FOLDER]...",
            help="The folders of all parts; those in `<data folder>.parts` when absent.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Join the parts that `dsllm data prepare --shard` made: the same bytes as from one machine.

    The parts are left as they are; delete them afterwards.
    """
    from dsllm.cli.data_progress import progress_shown
    from dsllm.cli.data_report import summary
    from dsllm.data.preparation.parts import merge as merge_parts
    from dsllm.data.preparation.parts import parts_directory
    from dsllm.data.prepare import default_directory
    from dsllm.spec.load import load_spec

    loaded = load_spec(spec, overrides or ())
    directory = default_directory(loaded)
    parts = folders or sorted(path for path in parts_directory(directory).glob("*-of-*") if path.is_dir())
    with progress_shown("joining") as show:
        manifest = merge_parts(loaded, directory, parts, on_progress=show)
    typer.echo(f"{directory}: {summary(manifest)}")


@app.command(epilog="Example: dsllm data inspect data/quickstart --verify")
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="SPEC|FOLDER", help="A prepared folder, or the spec that it was prepared from.")
    ],
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file again and compare checksums.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a prepared folder holds: counts, lengths, what was dropped, a decoded sample of each source.

    With a spec also the mix: the share of each source in the run, and how often the run repeats it.
    """
    from dsllm.cli.data_report import facts, print_facts
    from dsllm.data.prepare import default_directory, reuse
    from dsllm.data.shards import verify as verify_shards
    from dsllm.spec.load import load_spec

    spec = None if _is_data_folder(target) else load_spec(target, overrides or ())
    directory = Path(target) if spec is None else default_directory(spec)
    if spec is not None:
        reuse(spec, directory)  # refuses data of another spec, whose sources the mix would not find
    if verify:
        verify_shards(directory)
    found = facts(directory, spec)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print_facts(found, verify)


def _is_data_folder(target: str) -> bool:
    """Whether `inspect` was given a folder: one that is prepared, or one that no preset is named like."""
    from dsllm.data.shards import MANIFEST_FILE
    from dsllm.spec.load import preset_names

    folder = Path(target)
    return (folder / MANIFEST_FILE).is_file() or (folder.is_dir() and target not in preset_names())
