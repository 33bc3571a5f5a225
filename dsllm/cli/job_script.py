"""The job script of `dsllm launch --write-sbatch`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from dsllm.spec.sections import Spec


def check_job_options(
    include: str | None, exclude: str | None, launcher: str | None, resume: str, min_hosts: int | None, num_nodes: int
) -> None:
    """Raises UserError for what cannot hold for a script that several jobs run, on hosts that Slurm chooses."""
    from dsllm.errors import UserError

    for option, given in (("--include", include), ("--exclude", exclude)):
        if given is not None:
            raise UserError(f"--write-sbatch: given with {option} {given}; Slurm chooses the hosts: leave it out")
    if launcher not in (None, "slurm"):
        raise UserError(
            f"--write-sbatch: given with --launcher {launcher}; srun starts the ranks of a job: leave it out"
        )
    if min_hosts is not None and min_hosts > num_nodes:
        raise UserError(f"--min-hosts: given {min_hosts}; the job has {num_nodes}; must be as many or fewer")
    if resume == "never":
        raise UserError(
            "--write-sbatch: given with --resume never, which every job but the first would refuse; leave it out: a "
            "job goes on from the run's own newest checkpoint, and starts afresh in a new --run-dir"
        )
    if resume != "auto":
        raise UserError(
            f"--write-sbatch: given with --resume {resume}, to which every job would go back; leave it out: a job goes "
            f"on from the run's own newest checkpoint; make its first by dsllm launch --resume {resume} --stop-after "
            "10m inside an salloc"
        )


def write_job_script(
    file: Path,
    spec: Spec,
    num_nodes: int | None,
    num_gpus: int | None,
    hostfile: str | None,
    run_dir: str | None,
    arguments: list[str],
    options: list[str],
    is_dry: bool,
) -> None:
    """A script for `sbatch` that starts `dsllm launch` with `arguments` on nodes of `num_gpus` each, and the folder
    that its log goes to; printed in their place where `is_dry`. `options` are lines of it, such as `--partition=gpu`.

    Raises UserError where the size of the job is not given, or the batch does not divide over it.
    """
    from dsllm.launch.sbatch import dsllm_program, sbatch_script
    from dsllm.plan.batch import check_batch

    nodes, ranks = num_nodes or 1, _ranks_per_node(num_gpus, hostfile)
    check_batch(spec.batch, nodes * ranks)
    logs = Path(run_dir or f"runs/{spec.name}").absolute() / "logs"
    script = sbatch_script(
        name=spec.name,
        num_nodes=nodes,
        ranks_per_node=ranks,
        program=dsllm_program(),
        launch_arguments=[*arguments, "--launcher", "slurm"],
        working_folder=Path.cwd(),
        output_folder=logs,
        on_cpu=os.environ.get("DS_ACCELERATOR") == "cpu",
        options=options,
    )
    if is_dry:
        typer.echo(script, nl=False)
        return
    logs.mkdir(parents=True, exist_ok=True)  # a job whose log has no folder fails without a word
    file.write_text(script)
    typer.echo(f"{file}: {nodes} x {ranks} ranks; sbatch {file} submits it, its log goes to {logs}")


def _ranks_per_node(num_gpus: int | None, hostfile: str | None) -> int:
    from dsllm.errors import UserError

    if hostfile is not None:
        raise UserError("--write-sbatch: given with --hostfile; Slurm chooses the hosts: give --num-nodes in its place")
    if num_gpus is None:
        raise UserError("--write-sbatch: given without --num-gpus; add it: the job asks for so many GPUs on each node")
    return num_gpus
