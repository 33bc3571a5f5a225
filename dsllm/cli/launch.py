"""Commands that start runs: launch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsllm.cli.networks import read_spec
from dsllm.cli.options import (
    Exclude,
    Hostfile,
    Include,
    MasterPort,
    NumGpus,
    NumNodes,
    Overrides,
    RunDir,
    SpecOption,
    one_spec,
)

if TYPE_CHECKING:
    from dsllm.launch.ending import Ending
    from dsllm.launch.run_plan import RunPlan
    from dsllm.launch.topology import Topology

app = typer.Typer(rich_markup_mode=None)

SHOWN_COMMANDS = 8
"""Of a dry run; each names all hosts, so of many hosts only the first is shown."""


@app.command(epilog="Example: dsllm launch 1b --hostfile hostfiles/two-node --set zero.stage=3")
def launch(
    spec: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="SPEC", help="A spec file, or the name of a preset.", show_default=False),
    ] = None,
    spec_option: SpecOption = None,
    num_gpus: NumGpus = None,
    num_nodes: NumNodes = None,
    hostfile: Hostfile = None,
    include: Include = None,
    exclude: Exclude = None,
    launcher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--launcher",
            metavar="NAME",
            help="local, pdsh, ssh, slurm, openmpi or torchrun; the one that fits when absent.",
        ),
    ] = None,
    run_dir: RunDir = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Whether and where to carry on from.")
    ] = "auto",
    stop_after: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--stop-after", metavar="TIME", help="Save and end after so long: 90s, 45m, 3h50m, 1d2h."),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="Start again so often, where that can help.")
    ] = 0,
    min_hosts: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--min-hosts", min=1, help="Start with so few hosts where others are not ready; all when absent."),
    ] = None,
    doctor: Annotated[bool, typer.Option(help="Refuse to start where dsllm doctor --quick would.")] = True,
    master_port: MasterPort = None,
    write_sbatch: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--write-sbatch",
            metavar="FILE",
            help="Write a script for Slurm's sbatch that runs this on --num-nodes nodes of --num-gpus, and stop.",
        ),
    ] = None,
    sbatch: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--sbatch", metavar="OPTION", help="Of that script, repeatable: --sbatch=--partition=gpu."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run on each host, and stop.")] = False,
    overrides: Overrides = None,
) -> None:
    """Check the hosts and the run, print the command that starts it, start it and watch over it."""
    from dsllm.launch.launchers import choose_launcher, train_arguments
    from dsllm.launch.restarts import Patience, carry_through
    from dsllm.launch.run_plan import RunPlan
    from dsllm.model.shapes import shape_of
    from dsllm.plan.batch import check_batch
    from dsllm.units import parse_duration

    spec = one_spec("launch", spec, spec_option)
    loaded = read_spec(spec, overrides)
    _check_resume(resume)
    stop_after_seconds = None if stop_after is None else parse_duration(stop_after, "--stop-after")
    if write_sbatch is not None:
        from dsllm.cli.job_script import check_job_options, write_job_script

        check_job_options(include, exclude, launcher, resume, min_hosts, num_nodes or 1)
        in_job = train_arguments(spec, run_dir, resume, overrides or [], stop_after)
        in_job += _given(max_restarts, min_hosts, doctor, master_port)
        file, options = Path(write_sbatch), sbatch or []
        write_job_script(file, loaded, num_nodes, num_gpus, hostfile, run_dir, in_job, options, is_dry=dry_run)
        return
    topology = topology_of(hostfile, num_nodes, num_gpus, include, exclude, launcher)
    _check_min_hosts(min_hosts, topology)
    check_batch(loaded.batch, topology.world_size)
    plan = RunPlan(
        spec_name=spec,
        spec=loaded,
        shape=shape_of(loaded),
        run_dir=Path(run_dir or f"runs/{loaded.name}"),
        given_run_dir=run_dir,
        overrides=tuple(overrides or ()),
        launcher=choose_launcher(launcher, topology, is_dry=dry_run),
        port=master_port,
        asks_doctor=doctor,
    )
    if dry_run:
        _show_dry_run(plan, topology, resume, stop_after)
        return
    patience = Patience(max_restarts, min_hosts)
    ending = carry_through(plan, topology, resume, stop_after_seconds, patience, say=_say)
    command = "the same command" if resume == "auto" else "the same command without --resume"
    conclude(ending, goes_on=f"{command} goes on from the last checkpoint")


def topology_of(
    hostfile: str | None = None,
    num_nodes: int | None = None,
    num_gpus: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
    launcher: str | None = None,
) -> Topology:
    """Where the ranks run. Raises UserError where hosts, slots or GPUs are fewer than asked for."""
    from dsllm.errors import UserError
    from dsllm.launch.slurm import in_allocation_order, needs_srun, refuse_unlike_gpus
    from dsllm.launch.topology import count_gpus, hostfile_topology, hosts_topology, local_topology

    if hostfile is not None:
        return hostfile_topology(hostfile, num_nodes, num_gpus, include, exclude, gpus=count_gpus())
    if launcher == "slurm" or (launcher is None and needs_srun(os.environ)):
        from dsllm.launch.allocation import slurm_hosts

        hosts = in_allocation_order(slurm_hosts(os.environ), os.environ)
        topology = hosts_topology("the Slurm job", hosts, num_nodes, num_gpus, include, exclude)
        refuse_unlike_gpus(topology.hosts)
        return topology
    if launcher in ("openmpi", "torchrun") and needs_srun(os.environ):
        raise UserError(
            f"--launcher: given {launcher} in a Slurm job without a hostfile, which would be this machine alone; "
            "dsllm hostfile --from slurm --output hosts, then add --hostfile hosts"
        )
    for option, given in (("--num-nodes", num_nodes), ("--include", include), ("--exclude", exclude)):
        if given not in (None, 1):
            raise UserError(f"{option}: given {given} without a hostfile; add --hostfile, which names the hosts")
    return local_topology(num_gpus, count_gpus())


def _show_dry_run(plan: RunPlan, topology: Topology, resume: str, stop_after: str | None) -> None:
    """What would run, as far as it is known before the hosts are asked."""
    from dsllm.launch.doctor.rendezvous import PREFERRED_PORT
    from dsllm.launch.launchers import Meeting, starts, train_arguments
    from dsllm.launch.readiness import forwarded, needs_file

    has_file = needs_file(plan.launcher, topology)
    file = "/tmp/dsllm-LAUNCH/environment" if has_file else None
    arguments = train_arguments(plan.spec_name, plan.given_run_dir, resume, plan.overrides, stop_after, file)
    meeting = Meeting("127.0.0.1" if topology.is_local else topology.names[0], plan.port or PREFERRED_PORT)
    planned = starts(plan.launcher, topology, meeting, arguments, Path.cwd())
    shown = planned if len(planned) <= SHOWN_COMMANDS else planned[:1]
    for start in shown:
        typer.echo(start.as_typed())
    if len(shown) < len(planned):
        typer.echo(f"… and so on for {len(planned) - len(shown)} more hosts, each with its node rank")
    if topology.is_local:
        return
    per_host = topology.ranks_per_host
    lines = [f"{name}: ranks {n * per_host} to {(n + 1) * per_host - 1}" for n, name in enumerate(topology.names)]
    typer.echo("\n".join(lines))
    if names := ", ".join(sorted(forwarded(plan.spec))):
        typer.echo(f"told to every host{', in a private file' if has_file else ''}: {names}")
    typer.echo("address and port are settled, and GPUs looked for, when the hosts are asked")


def conclude(ending: Ending, goes_on: str | None = None) -> None:
    """The exit status; and what ended the run, unless rank 0 has said it on screen. `goes_on` says what another start
    would do, if anything."""
    from dsllm.errors import DsllmError, UserError

    if ending.is_good:
        return
    if _is_on_screen(ending):
        raise typer.Exit(ending.exit_status)
    where = f" on {ending.host}" if ending.host else ""
    kind = UserError if ending.cause == "user_error" else DsllmError
    advice = f"; {goes_on}" if goes_on and kind is DsllmError else ""
    raise kind(f"ended by {ending.cause}{where}: {ending.message}{advice}")


def _is_on_screen(ending: Ending) -> bool:
    """Rank 0 says what it fails of, and a mistake that every rank finds; where it is gone, nobody has said so."""
    if ending.cause == "user_error":
        return not ending.rank
    return ending.rank == 0 and ending.cause not in ("lost_rank", "lost_host")


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _given(max_restarts: int, min_hosts: int | None, doctor: bool, master_port: int | None) -> list[str]:
    """The supervisor's options again; defaults are left out."""
    arguments = ["--max-restarts", str(max_restarts)] if max_restarts else []
    if min_hosts is not None:
        arguments += ["--min-hosts", str(min_hosts)]
    if master_port is not None:
        arguments += ["--master-port", str(master_port)]
    return arguments if doctor else [*arguments, "--no-doctor"]


def _check_resume(resume: str) -> None:
    from dsllm.errors import UserError

    if resume not in ("auto", "never") and not Path(resume).exists():
        raise UserError(
            f"--resume: given '{resume}'; there is no such path; must be auto, never or a checkpoint's path"
        )


def _check_min_hosts(min_hosts: int | None, topology: Topology) -> None:
    from dsllm.errors import UserError

    if min_hosts is not None and min_hosts > topology.num_hosts:
        raise UserError(
            f"--min-hosts: given {min_hosts}; the launch has {topology.num_hosts}; must be as many or fewer"
        )
