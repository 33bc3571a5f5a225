"""Arguments and options that several commands share, so that they read and behave alike."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

SpecArgument = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="A spec file (YAML or JSON), or the name of a preset; `dsllm presets` lists them.",
        show_default=False,
    ),
]

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - evaluated at run time, also by Python 3.10
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override a field of the spec; may be repeated. Example: --set zero.stage=3",
        show_default=False,
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

SkipBadLines = Annotated[
    bool, typer.Option("--skip-bad-lines", help="Leave out lines of JSON files that cannot be read.")
]


def one_spec(command: str, argument: str | None, option: str | None) -> str:
    """The spec that a command is given, as its argument or with `--spec`.

    Raises UserError where it is given none, or two.
    """
    from dsllm.errors import UserError

    given = [spec for spec in (argument, option) if spec is not None]
    if len(given) != 1:
        raise UserError(f"{command}: given {len(given)} specs; name one, as in dsllm {command} quickstart")
    return given[0]
