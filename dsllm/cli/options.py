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

SpecOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--spec", metavar="SPEC", help="The same, as dsllm/train.py has it."),
]

NumGpus = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--num-gpus", min=1, help="Ranks on each host; every GPU when absent, 2 where there is none."),
]

NumNodes = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--num-nodes", min=1, help="Use only the first hosts."),
]

Hostfile = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--hostfile", metavar="FILE", help="Hosts and their slots; this machine alone when absent."),
]

Include = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--include", metavar="HOSTS", help="Only these hosts, or slots: worker-1@worker-2:0,2."),
]

Exclude = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--exclude", metavar="HOSTS", help="All but these hosts, or slots."),
]

RunDir = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--run-dir", metavar="DIR", help="Folder of the run; runs/<name> when absent."),
]

MasterPort = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--master-port", min=1, max=65535, help="Port of rank 0; a free one where it is in use, or absent."),
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
