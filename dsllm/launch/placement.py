"""The place of this process among all that train, from whatever launcher has started it.

Each tells it by variables of its own. Written under the names that torch and DeepSpeed read, nothing further down needs
to know which launcher it was, and DeepSpeed does not look for mpi4py.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from dsllm.errors import UserError
from dsllm.launch.slurm_job import expand_counts, expand_nodelist, in_step, rendezvous_port

MASTER_PORT = 29500
"""Of rank 0 where nothing else is said: the default of DeepSpeed (deepspeed/constants.py) and torch.distributed."""


@dataclass(frozen=True)
class Place:
    """One process among all."""

    rank: int
    local_rank: int
    """Among those on its host."""
    world_size: int
    local_size: int | None
    """Ranks on its host; None where the launcher does not tell."""
    launcher: str
    """Whose variables say so."""


ALONE = Place(0, 0, 1, 1, "none")


@dataclass(frozen=True)
class _Names:
    """Variables by which a launcher tells a place; of those of the local size the first that is set."""

    launcher: str
    rank: str
    local_rank: str
    world_size: str
    local_size: tuple[str, ...]


_LAUNCHERS = (
    _Names("deepspeed or torchrun", "RANK", "LOCAL_RANK", "WORLD_SIZE", ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")),
    _Names(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    # before Slurm, whose srun starts the hosts' helpers of an mpirun, and not its ranks
    _Names("MPICH", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", ("MPI_LOCALNRANKS",)),
    _Names("Slurm", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", ()),
)
"""RANK first: DeepSpeed and torchrun set it in whatever they were themselves started by."""


def place_in(environment: Mapping[str, str]) -> Place | None:
    """What the launcher says; None where there is none.

    Raises UserError where it says only a part of it, or what is no number.
    """
    for names in _LAUNCHERS:
        if names.rank not in environment:
            continue
        if names.launcher == "Slurm" and not in_step(environment):
            continue  # a batch script has a SLURM_PROCID too, and is no rank
        if names.launcher == "MPICH" and names.local_rank not in environment:
            continue  # srun --mpi=pmi2 sets the rest, and tells local ranks in its own way
        local_size = next((environment[name] for name in names.local_size if environment.get(name)), None)
        return Place(
            rank=_number(environment, names.rank, names),
            local_rank=_number(environment, names.local_rank, names),
            world_size=_number(environment, names.world_size, names),
            local_size=int(local_size) if local_size else _slurm_local_size(environment, names),
            launcher=names.launcher,
        )
    return None


def take_place(environment: MutableMapping[str, str], place: Place | None = None) -> Place:
    """Write `place`, that of this process when absent, into `environment`, as torch and DeepSpeed read it.

    A process that no launcher started is a world of one. Raises UserError where it is not said where rank 0 is.
    """
    place = place or place_in(environment) or ALONE
    canonical = {
        "RANK": place.rank,
        "LOCAL_RANK": place.local_rank,
        "WORLD_SIZE": place.world_size,
        **({} if place.local_size is None else {"LOCAL_SIZE": place.local_size}),
        **_master(place, environment),
    }
    environment.update({name: str(value) for name, value in canonical.items()})
    return place


def _master(place: Place, environment: Mapping[str, str]) -> dict[str, str]:
    """Where the ranks meet, as far as it is not set."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if not missing:
        return {}
    if place.world_size == 1:
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if place.launcher == "Slurm" and (nodes := environment.get("SLURM_STEP_NODELIST")):
        first, *_ = expand_nodelist(nodes, "SLURM_STEP_NODELIST")
        derived = {"MASTER_ADDR": first, "MASTER_PORT": str(rendezvous_port(environment))}
        return {name: derived[name] for name in missing}
    how = f"mpirun -x MASTER_ADDR=… -x MASTER_PORT={MASTER_PORT}" if place.launcher == "Open MPI" else "export both"
    raise UserError(
        f"{' and '.join(missing)}: not set for {place.world_size} ranks of {place.launcher}; must be the address of "
        f"rank 0's host and a free port there; {how}, or start with dsllm launch"
    )


def _slurm_local_size(environment: Mapping[str, str], names: _Names) -> int | None:
    """From `4(x2),3`, tasks on the step's nodes; else from what the job asked for on each."""
    if names.launcher != "Slurm":
        return None
    node = int(environment.get("SLURM_NODEID", "0"))
    counts = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if node < len(counts):
        return counts[node]
    per_node = environment.get("SLURM_NTASKS_PER_NODE", "")
    return int(per_node) if per_node.isdecimal() else None


def _number(environment: Mapping[str, str], name: str, names: _Names) -> int:
    text = environment.get(name)
    if text is None or not text.isdecimal():
        given = "not set" if text is None else f"given '{text}'"
        raise UserError(
            f"{name}: {given} beside {names.rank}; must be a number, as {names.launcher} sets it; unset "
            f"{names.rank}, or start with dsllm launch"
        )
    return int(text)


def _free_port() -> int:
    """A TCP port of this host that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
