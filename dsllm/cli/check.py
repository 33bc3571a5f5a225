"""The command that checks a run before its first step: check."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from dsllm.cli.options import AsJson, Overrides, SpecArgument

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog="Example: dsllm check my.yaml --num-gpus 2    or: dsllm check 1b --set zero.stage=3 --json")
def check(
    spec: SpecArgument,
    num_gpus: Annotated[
        Optional[int],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option("--num-gpus", min=1, help="Ranks; every GPU of this machine when absent, 2 where there is none."),
    ] = None,
    master_port: Annotated[int, typer.Option("--master-port", min=1, max=65535, help="Port of rank 0.")] = 29500,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check weights, loss, gradients and ZeRO stage on real ranks, before a run starts.

    A fresh run does the same before its first step. No data is read and nothing is kept; the model is made as for the
    run, and takes as much memory.
    """
    from dsllm.cli.launch import check_batch, topology_of
    from dsllm.launch.command import launch_command, launch_environment, train_arguments
    from dsllm.launch.supervisor import run_launcher
    from dsllm.spec.load import load_spec

    topology = topology_of(None, None, num_gpus)
    check_batch(load_spec(spec, overrides or ()), topology.world_size)
    with tempfile.TemporaryDirectory() as run_dir:
        arguments = [*train_arguments(spec, run_dir, "auto", overrides or ()), "--check"]
        command = launch_command(topology, master_port, arguments)
        status = run_launcher(command, launch_environment(topology), stdout=sys.stderr)
        results = Path(run_dir) / "checks.json"
        if results.is_file():
            _show(json.loads(results.read_text()), as_json)
    raise typer.Exit(status)


def _show(results: dict[str, Any], as_json: bool) -> None:
    from dsllm.cli.tables import print_table
    from dsllm.units import format_duration

    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    rows = [
        [
            check["name"],
            "passed" if check["passed"] else "FAILED",
            format_duration(check["seconds"]),
            check["found"],
            check["expected"],
        ]
        for check in results["checks"]
    ]
    print_table(["check", "", "in", "found", "expected"], rows)
