"""The command that examines hosts before a run: doctor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dsllm.cli.networks import read_spec
from dsllm.cli.options import (
    AsJson,
    Exclude,
    Hostfile,
    Include,
    NumGpus,
    NumNodes,
    Overrides,
    RunDir,
    SpecOption,
    one_spec,
)

if TYPE_CHECKING:
    from dsllm.launch.doctor.doctor import Report, Wanted
    from dsllm.launch.doctor.finding import Finding
    from dsllm.launch.hostfile import Host
    from dsllm.launch.topology import Topology

app = typer.Typer(rich_markup_mode=None)

COLUMNS = {
    "reach": ("reach",),
    "versions": ("python", "versions", "dsllm", "spec"),
    "GPUs": ("GPUs", "processes"),
    "memory": ("memory", "host memory"),
    "folder": ("folder", "history", "space", "data"),
    "clock": ("clock",),
    "port": ("port",),
    "link": ("link",),
}
"""Of the table, and the checks that each stands for."""
MOST_LINES = 40
"""Of the table; of more hosts only those with something to say are shown."""


@app.command(epilog="Example: dsllm doctor 1b --hostfile hostfiles/two-node")
def doctor(
    spec: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Argument(
            metavar="SPEC",
            help="A spec file, or the name of a preset: what it needs is checked too.",
            show_default=False,
        ),
    ] = None,
    spec_option: SpecOption = None,
    num_gpus: NumGpus = None,
    num_nodes: NumNodes = None,
    hostfile: Hostfile = None,
    include: Include = None,
    exclude: Exclude = None,
    run_dir: RunDir = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not measure the links between the hosts.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check every host before a run: reachable, alike, large enough, and fast enough between each other."""
    from dsllm.cli.launch import topology_of
    from dsllm.launch.doctor.doctor import examine
    from dsllm.launch.hosts import Hosts
    from dsllm.launch.launchers import choose_launcher, way_to_hosts

    topology = topology_of(hostfile, num_nodes, num_gpus, include, exclude)
    given = None if spec is None and spec_option is None else one_spec("doctor", spec, spec_option)
    wanted = _wanted(given, overrides or [], topology, run_dir)
    with Hosts(topology.names, way_to_hosts(choose_launcher(None, topology), topology)) as hosts:
        report = examine(hosts, wanted, quick)
    if as_json:
        typer.echo(json.dumps(as_document(report), indent=2))
    else:
        print_report(report)
    raise typer.Exit(0 if report.is_ready else 1)


def _wanted(spec: str | None, overrides: list[str], topology: Topology, run_dir: str | None) -> Wanted:
    """Raises UserError for a spec that is none, or whose batch does not divide over the slots."""
    from dsllm.errors import UserError
    from dsllm.launch.doctor.doctor import Wanted
    from dsllm.model.shapes import shape_of
    from dsllm.plan.batch import check_batch

    hosts = _selected(topology)
    if spec is None:
        if overrides:
            raise UserError("--set: nothing to override without SPEC; give a spec, or remove --set")
        return Wanted(hosts, run_dir=Path(run_dir or "runs"), on_cpu=topology.on_cpu)
    loaded = read_spec(spec, overrides)
    check_batch(loaded.batch, topology.world_size)
    return Wanted(
        hosts,
        spec=loaded,
        shape=shape_of(loaded),
        spec_file=Path(spec) if Path(spec).is_file() else None,
        run_dir=Path(run_dir or f"runs/{loaded.name}"),
        on_cpu=topology.on_cpu,
    )


def _selected(topology: Topology) -> tuple[Host, ...]:
    """The hosts; on this machine alone with the slots that were chosen, among the GPUs of CUDA_VISIBLE_DEVICES."""
    from dsllm.launch.topology import selected_devices

    if not topology.devices:
        return topology.hosts
    selected = selected_devices()
    (own,) = topology.hosts
    slots = [int(device) if selected is None else selected.index(device) for device in topology.devices]
    return (replace(own, chosen=tuple(slots[: own.slots])),)


# --- what is found ----------------------------------------------------------------------------------------------------


def print_report(report: Report) -> None:
    """A line for each host, what to do about each failure, and the verdict."""
    from dsllm.cli.tables import print_table
    from dsllm.launch.doctor.link import summary

    shown = _shown(report)
    if shown:
        print_table(
            ["host", *COLUMNS], [[host, *(_cell(report, host, column) for column in COLUMNS)] for host in shown]
        )
    if len(shown) < len(report.hosts):
        typer.echo(f"{len(report.hosts) - len(shown)} more hosts: ok\n")
    for outcome in ("failed", "warned"):
        for line in _lines([finding for finding in report.findings if finding.outcome == outcome]):
            typer.echo(line)
    if report.is_ready and report.rendezvous is not None and len(report.hosts) > 1:
        typer.echo(f"ranks meet at {report.rendezvous.address}, port {report.rendezvous.port}")
    if report.links is not None:
        typer.echo(summary(report.links))
    typer.echo(f"{report.verdict} ({report.seconds:.1f} s)")


def _shown(report: Report) -> list[str]:
    """The hosts that the table has."""
    if len(report.hosts) <= MOST_LINES:
        return list(report.hosts)
    bad = {finding.host for finding in report.findings if finding.outcome in ("failed", "warned")}
    return [host for host in report.hosts if host in bad]


def _cell(report: Report, host: str, column: str) -> str:
    outcomes = {one.outcome for one in report.findings if one.host == host and one.check in COLUMNS[column]}
    if "failed" in outcomes:
        return "FAILED"
    return "warned" if "warned" in outcomes else "ok" if "passed" in outcomes else "-"


def _lines(findings: Sequence[Finding]) -> list[str]:
    """What was found and what to do, once for all hosts that it is the same for."""
    from dsllm.launch.doctor.finding import listed

    hosts: dict[tuple[str, str, str, str], list[str]] = {}
    for one in findings:
        hosts.setdefault((one.outcome, one.check, one.found, one.remedy), []).append(one.host)
    return [
        f"{listed(names)}: {check} {outcome}: {found}\n    -> {remedy}"
        for (outcome, check, found, remedy), names in hosts.items()
    ]


def as_document(report: Report) -> dict[str, Any]:
    """The report as JSON has it; bytes and seconds are plain numbers."""
    return {
        "ready": report.is_ready,
        "verdict": report.verdict,
        "seconds": report.seconds,
        "hosts": {host: asdict(report.facts[host]) if host in report.facts else None for host in report.hosts},
        "findings": [asdict(finding) for finding in report.findings],
        "rendezvous": None if report.rendezvous is None else asdict(report.rendezvous),
        "links": None if report.links is None else asdict(report.links),
    }
