"""The `srun` commands of a run inside a Slurm allocation: one for its ranks, one for a shell on a host of it.

Options are those of srun(1) since Slurm 20.11, which brought `--overlap`. All are given, not left to Slurm, which would
take them from the variables of the job: `SLURM_NTASKS`, `SLURM_EXPORT_ENV` and their like are options to srun.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsllm.errors import UserError
from dsllm.launch.hostfile import Host

_FIRST_SPECIAL_STEP = 0xFFFF_FFF0
"""From here on ids are not those of steps that srun was asked for, but the batch script's, salloc's shell's, ssh's."""

_FIRST_PORT = 10_000
_NUM_PORTS = 20_000
"""Below the ports that Linux hands out itself, from 32768."""

_SHARED_OPTIONS = (
    "--overlap",  # a step keeps what it has from other steps, and ranks and shells would wait for each other
    "--cpu-bind=none",  # else one core a task, for its data loading and its communication too
    "--mpi=none",  # ranks meet at MASTER_ADDR; a PMI would only open ports
    "--export=ALL",  # a job that was submitted with --export=NONE hands that on
)


def srun_command(hosts: Sequence[Host], ranks_per_host: int, command: Sequence[str]) -> list[str]:
    """Starts `command` once for each rank: `ranks_per_host` on each of `hosts`, which are in the allocation's order.

    A rank has `SLURM_PROCID`, `SLURM_LOCALID` and `SLURM_NODEID` for rank, local rank and node rank. Output is not
    buffered where Python's is not (`python -u`): srun's `--unbuffered` would give ranks a terminal.
    """
    return [
        "srun",
        f"--nodes={len(hosts)}",
        f"--ntasks={len(hosts) * ranks_per_host}",
        f"--ntasks-per-node={ranks_per_host}",
        f"--nodelist={','.join(host.name for host in hosts)}",
        "--distribution=block",  # rank 8 is the first of the second host, as other launchers have it
        *_SHARED_OPTIONS,
        "--overcommit",  # a job may have fewer cores than GPUs
        "--gpu-bind=none",  # ranks see all GPUs of their host and take the one of their local rank
        "--kill-on-bad-exit=1",  # else the others wait in a collective for a rank that failed
        "--input=none",
        *command,
    ]


def srun_one(host: str, shell_command: str) -> list[str]:
    """Runs a shell command on one host of the allocation, beside the ranks; stdin, stdout and stderr are this end's."""
    return [
        "srun",
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        f"--nodelist={host}",
        *_SHARED_OPTIONS,
        "--quiet",
        "sh",
        "-c",
        shell_command,
    ]


def in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process, rather than a batch script, or the shell of an allocation."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def rendezvous_port(environment: Mapping[str, str]) -> int:
    """A port for the ranks to meet at that two jobs on one node are unlikely to share, where none can be asked for.

    Raises UserError outside a Slurm job.
    """
    job = environment.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        raise UserError(f"SLURM_JOB_ID: given '{job}'; must be the number of a job; start the run inside a Slurm job")
    return _FIRST_PORT + int(job) % _NUM_PORTS


def is_job_of_several_nodes(environment: Mapping[str, str]) -> bool:
    """Whether this process is the batch script or the shell of such a job: a run on this node alone is not meant."""
    return not in_step(environment) and environment.get("SLURM_JOB_NUM_NODES", "1") not in ("", "1")
