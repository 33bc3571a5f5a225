"""The command that checks a run before its first step: check."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from dsllm.cli.networks import read_spec
from dsllm.cli.options import AsJson, MasterPort, Overrides, SpecArgument

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog="Example: dsllm check my.yaml --num-gpus 2    or: dsllm check 1b --set zero.stage=3 --json")
def check(
    spec: SpecArgument,
    num_gpus: Annotated[
        Optional[int],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option("--num-gpus", min=1, help="Ranks; every GPU of this machine when absent, 2 where there is none."),
    ] = None,
    master_port: MasterPort = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check weights, loss, gradients and ZeRO stage on real ranks, before a run starts.

    A fresh run does the same before its first step. No data is read and nothing is kept; the model is made as for the
    run, and takes as much memory.
    """
    from dsllm.cli.launch import conclude, topology_of
    from dsllm.launch.restarts import Patience, carry_through
    from dsllm.launch.run_plan import RunPlan
    from dsllm.launch.supervisor import Screen
    from dsllm.model.shapes import shape_of
    from dsllm.plan.batch import check_batch

    topology, loaded = topology_of(num_gpus=num_gpus, launcher="local"), read_spec(spec, overrides)
    check_batch(loaded.batch, topology.world_size)
    with tempfile.TemporaryDirectory() as run_dir:
        plan = RunPlan(
            spec_name=spec,
            spec=loaded,
            shape=shape_of(loaded),
            run_dir=Path(run_dir),
            given_run_dir=run_dir,
            overrides=tuple(overrides or ()),
            port=master_port,
            only_checks=True,
        )
        screen = Screen(out=sys.stderr)
        ending = carry_through(plan, topology, "auto", None, Patience(), say=_say, screen=screen)
        results = Path(run_dir) / "checks.json"
        if results.is_file():
            _show(json.loads(results.read_text()), as_json)
    conclude(ending)


def _say(line: str) -> None:
    typer.echo(line, err=True)


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
