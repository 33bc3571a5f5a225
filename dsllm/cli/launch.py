"""Commands that start runs: launch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsllm.cli.options import Overrides

if TYPE_CHECKING:
    from dsllm.launch.command import Topology
    from dsllm.spec.sections import Spec

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog="Example: dsllm launch 1b --hostfile hostfiles/two-node --set zero.stage=3")
def launch(
    spec: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="SPEC", help="A spec file, or the name of a preset.", show_default=False),
    ] = None,
    spec_option: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--spec", metavar="SPEC", help="The same, as dsllm/train.py has it."),
    ] = None,
    num_gpus: Annotated[
        Optional[int],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option("--num-gpus", min=1, help="Ranks on each host; every GPU when absent, 2 where there is none."),
    ] = None,
    num_nodes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--num-nodes", min=1, help="Use only the first hosts of the hostfile."),
    ] = None,
    hostfile: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--hostfile", metavar="FILE", help="Hosts and their slots; this machine alone when absent."),
    ] = None,
    run_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--run-dir", metavar="DIR", help="Folder of the run; runs/<name> when absent."),
    ] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Whether and where to carry on from.")
    ] = "auto",
    stop_after: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--stop-after", metavar="TIME", help="Save and end after so long: 90s, 45m, 3h50m, 1d2h."),
    ] = None,
    master_port: Annotated[int, typer.Option("--master-port", min=1, max=65535, help="Port of rank 0.")] = 29500,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and stop.")] = False,
    overrides: Overrides = None,
) -> None:
    """Check a run, print the deepspeed command that starts it, and start it."""
    from dsllm.launch.command import launch_command, launch_environment, train_arguments
    from dsllm.launch.supervisor import run_launcher
    from dsllm.spec.load import load_spec
    from dsllm.units import parse_duration

    spec = _one_spec(spec, spec_option)
    loaded = load_spec(spec, overrides or ())
    _check_resume(resume)
    if stop_after is not None:
        parse_duration(stop_after, "--stop-after")
    topology = topology_of(hostfile, num_nodes, num_gpus)
    check_batch(loaded, topology.world_size)
    arguments = train_arguments(spec, run_dir, resume, overrides or (), stop_after)
    command = launch_command(topology, master_port, arguments)
    environment = launch_environment(topology)
    typer.echo(_as_typed(command, environment))
    if not dry_run:
        raise typer.Exit(run_launcher(command, environment))


def topology_of(hostfile: str | None, num_nodes: int | None, num_gpus: int | None) -> Topology:
    """Where the ranks run. Raises UserError where hosts, slots or GPUs are fewer than asked for."""
    from dsllm.errors import UserError
    from dsllm.launch.command import count_gpus, hostfile_topology, local_topology
    from dsllm.launch.hostfile import read_hostfile

    if hostfile is not None:
        return hostfile_topology(hostfile, read_hostfile(hostfile), num_nodes, num_gpus, gpus=count_gpus())
    if num_nodes not in (None, 1):
        raise UserError(f"--num-nodes: given {num_nodes} without a hostfile; add --hostfile, which names the hosts")
    return local_topology(num_gpus, count_gpus())


def check_batch(spec: Spec, world_size: int) -> None:
    """Raises UserError where the spec's batch leaves a remainder on so many ranks."""
    from dsllm.plan.batch import micro_batch_choices, resolve_batch

    if spec.batch.micro_batch_size == "auto":
        micro_batch_choices(spec.batch.global_batch_size, world_size)
    else:
        resolve_batch(spec.batch, world_size)


def _one_spec(argument: str | None, option: str | None) -> str:
    from dsllm.errors import UserError

    given = [spec for spec in (argument, option) if spec is not None]
    if len(given) != 1:
        raise UserError(f"launch: given {len(given)} specs; name one, as in dsllm launch quickstart")
    return given[0]


def _check_resume(resume: str) -> None:
    from dsllm.errors import UserError

    if resume not in ("auto", "never") and not Path(resume).exists():
        raise UserError(
            f"--resume: given '{resume}'; there is no such path; must be auto, never or a checkpoint's path"
        )


def _as_typed(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as it would be typed into a shell."""
    return shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command])
