"""The `srun` commands of a run inside a Slurm allocation: one for its ranks, one for a shell on a host of it.

Options are those of srun(1) since Slurm 20.11, which brought `--overlap`. All are given, not left to Slurm, which would
take them from the variables of the job: `SLURM_NTASKS`, `SLURM_EXPORT_ENV` and their like are options to srun.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence

from dsllm.errors import UserError
from dsllm.launch.hostfile import Host
from dsllm.launch.slurm_job import expand_nodelist, in_step

_OPTIONS_OF_THE_JOB = (
    "SLURM_GPUS",  # of the whole job: more than a step on one of its hosts can have
    "SLURM_GPUS_PER_SOCKET",
    "SLURM_GPUS_PER_TASK",  # would leave one GPU to a shell that is to count them
    "SLURM_NTASKS_PER_GPU",  # excludes --ntasks-per-node
    "SLURM_TRES_PER_TASK",
    "SLURM_CPUS_PER_TASK",  # with ranks on fewer hosts than the job has, more than there are
    "SRUN_CPUS_PER_TASK",
)
"""Variables that srun reads as options, and no option of its own takes back. Without them a step has all that its job
has on the host."""

_SHARED_OPTIONS = (
    "--overlap",  # a step keeps what it has from other steps, and ranks and shells would wait for each other
    "--mpi=none",  # ranks meet at MASTER_ADDR; a PMI would only open ports
    "--export=ALL",  # a job that was submitted with --export=NONE hands that on
)


_IGNORED = "trap '' USR1 USR2"
"""Slurm sends these to every process of a step: they would end shells, and ranks that do not answer them yet."""


def srun_command(
    hosts: Sequence[Host], ranks_per_host: int, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> list[str]:
    """Starts `command` once for each rank, `ranks_per_host` on each of `hosts`, which are `in_allocation_order`, on the
    GPUs of each that are chosen, the same of all.

    A rank has `SLURM_PROCID`, `SLURM_LOCALID` and `SLURM_NODEID` for rank, local rank and node rank. Output is not
    buffered where Python's is not (`python -u`): srun's `--unbuffered` would give ranks a terminal.

    Stop it with SIGUSR2: srun hands that and SIGUSR1 on to every rank, kills them all at SIGTERM and SIGHUP, and
    answers SIGINT itself. It ends with the highest status of all, which is 143 for ranks that it ends because one
    failed.
    `environment` is that of srun, this process's own when absent.
    """
    return [
        *_srun(environment),
        f"--nodes={len(hosts)}",
        f"--ntasks={len(hosts) * ranks_per_host}",
        f"--ntasks-per-node={ranks_per_host}",
        f"--nodelist={','.join(host.name for host in hosts)}",
        "--distribution=block",  # rank 8 is the first of the second host, as other launchers have it
        *_SHARED_OPTIONS,
        "--cpu-bind=none",  # else one core a rank, for its data loading and its communication too
        "--overcommit",  # a job may have fewer cores than GPUs
        "--gpu-bind=none",  # ranks see all GPUs of their host and take the one of their local rank
        "--kill-on-bad-exit=1",  # else the others wait in a collective for a rank that failed
        "--input=none",
        *("sh", "-c", f'{_IGNORED}; {_selection(hosts)}exec "$@"', "sh"),
        *command,
    ]


def srun_one(host: str, shell_command: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """Runs a shell command on one host of the allocation, beside the ranks; stdin, stdout and stderr are this end's."""
    return [
        *_srun(environment),
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        f"--nodelist={host}",
        *_SHARED_OPTIONS,
        "--quiet",
        "sh",
        "-c",
        f"{_IGNORED}; {shell_command}",
    ]


def _selection(hosts: Sequence[Host]) -> str:
    """Shell that narrows CUDA_VISIBLE_DEVICES to the chosen GPUs; nothing where they are simply the first.

    It runs in each task, since Slurm sets the variable there, for a step, whatever srun was started with: slots are
    places in its list, or numbers where Slurm does not manage GPUs.
    """
    slots = hosts[0].slot_ids
    assert all(host.slot_ids == slots for host in hosts), "refuse_unlike_gpus was not asked"
    if hosts[0].chosen is None:
        return ""
    every = ",".join(map(str, range(slots[-1] + 1)))
    fields = ",".join(str(slot + 1) for slot in slots)
    return (
        f'CUDA_VISIBLE_DEVICES=$(echo "${{CUDA_VISIBLE_DEVICES:-{every}}}" | cut -s -d, -f{fields}); '
        "export CUDA_VISIBLE_DEVICES; "
    )


def _srun(environment: Mapping[str, str] | None) -> list[str]:
    """`srun` without the options of the job that it would take from its environment."""
    present = os.environ if environment is None else environment
    unset = [word for name in _OPTIONS_OF_THE_JOB if name in present for word in ("-u", name)]
    return ["env", *unset, "srun"] if unset else ["srun"]


def in_allocation_order(hosts: Sequence[Host], environment: Mapping[str, str]) -> list[Host]:
    """`hosts` as srun orders them whatever `--nodelist` says, so that the first is that of rank 0.

    Raises UserError where one is not in the job.
    """
    listed = environment.get("SLURM_JOB_NODELIST", "")
    place = {name: index for index, name in enumerate(expand_nodelist(listed, "SLURM_JOB_NODELIST"))}
    for host in hosts:
        if host.name not in place:
            raise UserError(
                f"host '{host.name}': not one of this Slurm job's, which are {listed}; name hosts as Slurm does"
            )
    return sorted(hosts, key=lambda host: place[host.name])


def refuse_unlike_gpus(hosts: Sequence[Host]) -> None:
    """Raises UserError where other GPUs are chosen of one host than of another: srun starts the same on all."""
    first = hosts[0]
    for host in hosts:
        if host.slot_ids != first.slot_ids:
            raise UserError(
                f"--include or --exclude: given GPUs {_listed(first)} of host '{first.name}' and {_listed(host)} of "
                f"'{host.name}'; must be the same of every host of a Slurm job; choose the same, or leave whole hosts "
                "out"
            )


def _listed(host: Host) -> str:
    return ",".join(map(str, host.slot_ids))


def needs_srun(environment: Mapping[str, str]) -> bool:
    """Whether this process is the batch script or the shell of a job that has other nodes than this machine, or only
    others, as where salloc opens its shell on the login node: a run on this machine alone is not meant.

    Raises UserError where Slurm's list of nodes is none.
    """
    if in_step(environment):
        return False
    if environment.get("SLURM_JOB_NUM_NODES", "1") not in ("", "1"):
        return True
    listed = environment.get("SLURM_JOB_NODELIST", "")
    return listed != "" and not _is_one_of(expand_nodelist(listed, "SLURM_JOB_NODELIST"), environment)


def _is_one_of(nodes: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether this machine is one of these nodes: by the name that Slurm's daemon has given its processes here, or by
    its own, either of which may have a domain."""
    own = socket.gethostname()
    same = {environment.get("SLURMD_NODENAME"), own, own.partition(".")[0]}
    return any(node in same or node.partition(".")[0] == own for node in nodes)
