"""The hosts that a scheduler has given a job, read from the environment that it sets.

Slurm: sbatch(1), "OUTPUT ENVIRONMENT VARIABLES". SageMaker: ENVIRONMENT_VARIABLES.md of its training toolkit. For MPI:
what PBS, LSF and Grid Engine set, Open MPI's own hostfile, and where there is none of these, what `mpirun` finds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from dsllm.errors import UserError
from dsllm.launch.hostfile import Host
from dsllm.launch.mpi import mpirun_environment
from dsllm.launch.slurm_job import expand_counts, expand_nodelist

Source = Literal["slurm", "sagemaker", "mpi"]

MPI_HOSTFILES = ("OMPI_MCA_orte_default_hostfile", "PRTE_MCA_prte_default_hostfile")
"""Names of Open MPI's own hostfile, in releases 4 and 5."""
SECONDS_TO_START_EVERYWHERE = 60.0

_GPUS = re.compile(r"(?:[^:,\s]+:)*(?P<gpus>[0-9]{1,9})")


def allocation_source(environment: Mapping[str, str]) -> Source | None:
    """The scheduler that started this process; None where there is none."""
    if "SLURM_JOB_ID" in environment:
        return "slurm"
    if "SM_HOSTS" in environment or "SM_RESOURCE_CONFIG" in environment:
        return "sagemaker"
    if any(environment.get(name) for name in ("PBS_NODEFILE", "LSB_MCPU_HOSTS", "PE_HOSTFILE", *MPI_HOSTFILES)):
        return "mpi"
    return None


def allocated_hosts(source: Source, environment: Mapping[str, str]) -> list[Host]:
    """The hosts of the job, in the scheduler's order, each with its GPUs or else its tasks for slots.

    Raises UserError where a variable is missing or malformed.
    """
    if source == "slurm":
        return slurm_hosts(environment)
    return sagemaker_hosts(environment) if source == "sagemaker" else mpi_hosts(environment)


def slurm_hosts(environment: Mapping[str, str]) -> list[Host]:
    """The nodes of the Slurm job that this process belongs to.

    Slots are the GPUs of a node, as asked for or as given to this one, whose like the others are taken to be; without
    GPUs, the tasks of a node.
    """
    nodes = environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError("SLURM_JOB_NODELIST: not set; start it inside a job of Slurm, with sbatch or salloc")
    names = expand_nodelist(nodes, "SLURM_JOB_NODELIST")
    counted = environment.get("SLURM_JOB_NUM_NODES", str(len(names)))
    if counted != str(len(names)):
        raise UserError(
            f"SLURM_JOB_NUM_NODES: given {counted}; SLURM_JOB_NODELIST '{nodes}' names {len(names)}; "
            "leave both as Slurm sets them"
        )
    return [Host(name, slots) for name, slots in zip(names, _slurm_slots(environment, len(names)), strict=True)]


def _slurm_slots(environment: Mapping[str, str], num_nodes: int) -> list[int]:
    """Ranks of each node of the job, in order."""
    gpus = _slurm_gpus(environment, num_nodes)
    if gpus:
        return [gpus] * num_nodes
    tasks = environment.get("SLURM_NTASKS_PER_NODE")
    if tasks:
        return [_count("SLURM_NTASKS_PER_NODE", tasks)] * num_nodes
    listed = environment.get("SLURM_TASKS_PER_NODE")
    if listed:
        return _tasks_per_node(listed, num_nodes)
    raise UserError(
        "SLURM_GPUS_ON_NODE: not set, nor any other number of GPUs or tasks; submit the job with --gpus-per-node"
    )


def _slurm_gpus(environment: Mapping[str, str], num_nodes: int) -> int:
    """GPUs of each node; 0 where the job has none."""
    per_node = environment.get("SLURM_GPUS_PER_NODE")
    if per_node:
        return _gpus("SLURM_GPUS_PER_NODE", per_node)
    here = environment.get("SLURM_GPUS_ON_NODE")
    in_all = environment.get("SLURM_GPUS")
    on_node = _gpus("SLURM_GPUS_ON_NODE", here) if here else 0
    total = _gpus("SLURM_GPUS", in_all) if in_all else on_node * num_nodes
    if total % num_nodes or (here and on_node * num_nodes != total):
        raise UserError(
            f"SLURM_GPUS: given {in_all} for {num_nodes} nodes, which leaves them different numbers; "
            "submit the job with --gpus-per-node instead of --gpus"
        )
    return total // num_nodes


def _gpus(name: str, text: str) -> int:
    """The sum over types in Slurm's forms `4`, `a100:4` and `a100:2,v100:2`."""
    matches = [_GPUS.fullmatch(part) for part in text.split(",")]
    if not all(matches):
        raise UserError(f"{name}: given '{text}'; must be a number of GPUs such as 8 or a100:8")
    return sum(int(match["gpus"]) for match in matches if match)


def _tasks_per_node(text: str, num_nodes: int) -> list[int]:
    counts = expand_counts(text)
    if len(counts) != num_nodes or 0 in counts:
        raise UserError(
            f"SLURM_TASKS_PER_NODE: given '{text}'; must be the tasks of each of {num_nodes} nodes, such as 8(x2),4"
        )
    return counts


def _count(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise UserError(f"{name}: given '{text}'; must be a whole number from 1")
    return int(text)


def sagemaker_hosts(environment: Mapping[str, str]) -> list[Host]:
    """The containers of a SageMaker job, in the order that all of them see, so that one run starts from the first.

    Their names are in `SM_HOSTS`, else in `SM_RESOURCE_CONFIG`; instances are alike, and without GPUs run one rank.
    """
    names = _sagemaker_names(environment)
    current = environment.get("SM_CURRENT_HOST", names[0])
    if current not in names:
        raise UserError(f"SM_CURRENT_HOST: given '{current}', which is none of {', '.join(names)}; unset it")
    gpus = environment.get("SM_NUM_GPUS")
    if not gpus:
        raise UserError("SM_NUM_GPUS: not set; start it from the job's entry point, or set it to the GPUs of a host")
    return [Host(name, max(1, _gpus("SM_NUM_GPUS", gpus))) for name in names]


def _sagemaker_names(environment: Mapping[str, str]) -> list[str]:
    name = "SM_HOSTS" if environment.get("SM_HOSTS") else "SM_RESOURCE_CONFIG"
    text = environment.get(name)
    if not text:
        raise UserError("SM_HOSTS: not set; start it inside a training job of SageMaker")
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if name == "SM_RESOURCE_CONFIG" and isinstance(given, dict):
        given = given.get("hosts")
    if not (isinstance(given, list) and given and all(isinstance(host, str) and host for host in given)):
        raise UserError(f'{name}: given \'{text}\'; must name the hosts as JSON, such as ["algo-1", "algo-2"]')
    return list(dict.fromkeys(given))


def mpi_hosts(environment: Mapping[str, str]) -> list[Host]:
    """The hosts that Open MPI would start ranks on, each with the slots that the scheduler has given the job there."""
    if path := environment.get("PBS_NODEFILE"):
        return _added_up(((name, 1) for _, (name, *_) in _lines("PBS_NODEFILE", path)), "PBS_NODEFILE")
    if text := environment.get("LSB_MCPU_HOSTS"):
        return _lsf_hosts(text)
    if path := environment.get("PE_HOSTFILE"):
        return _added_up(_grid_engine_lines(path), "PE_HOSTFILE")
    for name in MPI_HOSTFILES:
        if path := environment.get(name):
            return _added_up(_open_mpi_lines(name, path), name)
    return ask_mpirun()


def _lsf_hosts(text: str) -> list[Host]:
    """Names and numbers of slots in turn: `hosta 8 hostb 8`."""
    words = text.split()
    if not words or len(words) % 2:
        raise UserError(f"LSB_MCPU_HOSTS: given '{text}'; must be hosts and their slots, such as `node1 8 node2 8`")
    pairs = zip(words[::2], words[1::2], strict=True)
    return _added_up(((name, _count("LSB_MCPU_HOSTS", slots)) for name, slots in pairs), "LSB_MCPU_HOSTS")


def _grid_engine_lines(path: str) -> Iterator[tuple[str, int]]:
    """Host, slots, queue and processors a line."""
    for number, words in _lines("PE_HOSTFILE", path):
        if len(words) < 2 or not re.fullmatch("[1-9][0-9]{0,8}", words[1]):
            raise UserError(
                f"PE_HOSTFILE: {path}, line {number}: given '{' '.join(words)}'; begins with host and slots"
            )
        yield words[0], int(words[1])


def _open_mpi_lines(name: str, path: str) -> Iterator[tuple[str, int]]:
    """`host slots=4 max_slots=8` a line; without the former the latter counts (mpirun(1))."""
    for number, (host, *settings) in _lines(name, path):
        given = dict(setting.partition("=")[::2] for setting in settings)
        slots = given.get("slots") or given.get("max_slots") or given.get("max-slots") or ""
        if not re.fullmatch("[1-9][0-9]{0,8}", slots):
            raise UserError(
                f"{name}: {path}, line {number}: given '{' '.join([host, *settings])}'; "
                "must say how many ranks, such as `node1 slots=8`"
            )
        yield host.rpartition("@")[2], int(slots)


def _lines(name: str, path: str) -> Iterator[tuple[int, list[str]]]:
    """Number and words of each line of the file that a variable names, without comments."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{name}: {path} cannot be read: {reason}; leave it as the scheduler sets it") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if words := line.partition("#")[0].split():
            yield number, words


def _added_up(pairs: Iterable[tuple[str, int]], source: str) -> list[Host]:
    """A host for each name, in the order in which they first come, with the sum of its slots."""
    slots: dict[str, int] = {}
    for name, more in pairs:
        slots[name] = slots.get(name, 0) + more
    if not slots:
        raise UserError(f"{source}: it lists no host; start it inside a job of the scheduler")
    return [Host(name, number) for name, number in slots.items()]


def ask_mpirun(seconds: float = SECONDS_TO_START_EVERYWHERE) -> list[Host]:
    """The hosts that `mpirun` finds by itself, which starts one process a slot: each prints the name of its host."""
    try:
        result = subprocess.run(
            ["mpirun", "hostname"],
            env={**os.environ, **mpirun_environment()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except FileNotFoundError:
        raise UserError("mpirun: not installed; install Open MPI, or name the hosts with --hostfile") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"mpirun: no answer in {seconds:.0f} s; see that `mpirun hostname` ends") from None
    if result.returncode != 0:
        said = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[0]
        raise UserError(f"mpirun: failed: {said}; see that `mpirun hostname` works")
    return _added_up(((name, 1) for name in result.stdout.split()), "mpirun hostname")
