"""The command that prints the hostfile of a job: hostfile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from dsllm.cli.options import AsJson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsllm.launch.hostfile import Host

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog="Example: dsllm hostfile --from slurm --output hosts")
def hostfile(
    source: Annotated[
        Literal["slurm", "sagemaker", "mpi"],
        typer.Option("--from", help="What started the job that this is run in.", show_default=False),
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option("--output", metavar="FILE", help="Write it there; to the screen when absent."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the hosts of a job as DeepSpeed's hostfile, from what its scheduler says."""
    import json
    import os

    from dsllm.launch.allocation import allocated_hosts

    hosts = allocated_hosts(source, os.environ)
    if as_json:
        text = json.dumps([{"host": host.name, "slots": host.slots} for host in hosts], indent=2)
    else:
        text = "\n".join(f"{host.name} slots={host.slots}" for host in hosts)
    if output is None:
        typer.echo(text)
        return
    output.write_text(f"{text}\n", encoding="utf-8")
    typer.echo(f"{output}: {_sentence(hosts)}")


def _sentence(hosts: Sequence[Host]) -> str:
    slots = sum(host.slots for host in hosts)
    return f"{len(hosts)} host{'s' * (len(hosts) != 1)}, {slots} slot{'s' * (slots != 1)}"
