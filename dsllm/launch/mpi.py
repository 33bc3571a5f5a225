"""The `mpirun` command of Open MPI 4 and 5 for a run's ranks, which it starts and watches; they speak no MPI."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dsllm.errors import UserError
from dsllm.launch.hostfile import Host


def mpirun_command(hosts: Sequence[Host], ranks_per_host: int, command: Sequence[str]) -> list[str]:
    """Starts `command` once for each rank, `ranks_per_host` on each of `hosts`; rank 0 on the first.

    A rank has `OMPI_COMM_WORLD_RANK` and `OMPI_COMM_WORLD_LOCAL_RANK`. Only variables that begin with `OMPI_` reach
    other hosts. Where one rank fails, mpirun ends the others, and itself with its status.

    Stop it with SIGUSR2: mpirun hands that and SIGUSR1 on to every rank, and lets a second pass after SIGTERM, SIGINT
    and SIGHUP until it kills them.

    Raises UserError where a host is an IPv6 address: a number after a colon is one of slots to mpirun.
    """
    for host in hosts:
        if ":" in host.name:
            raise UserError(
                f"host '{host.name}': given with --launcher openmpi, whose mpirun takes no address with colons; name "
                "the host in the hostfile, as /etc/hosts can, or start with --launcher ssh"
            )
    return [
        "mpirun",
        "-np",
        str(len(hosts) * ranks_per_host),
        "--host",
        ",".join(f"{host.name}:{ranks_per_host}" for host in hosts),
        "--map-by",
        f"ppr:{ranks_per_host}:node",
        "--bind-to",
        "none",  # else one core a rank, for its data loading and its communication too
        *command,
    ]


def mpirun_environment(is_root: bool | None = None) -> dict[str, str]:
    """What the environment of `mpirun` needs besides this one's. `is_root` is found out when absent.

    The first host starts every other one: Open MPI would have hosts start each other from 64 on, for which ssh would
    have to lead from each to each. As root, as in most containers, Open MPI wants to be told twice.
    """
    # release 5 leaves starting to PRRTE, which has names of its own
    additions = {"OMPI_MCA_plm_rsh_no_tree_spawn": "1", "PRTE_MCA_plm_ssh_no_tree_spawn": "1"}
    if os.geteuid() == 0 if is_root is None else is_root:
        for project in ("OMPI", "PRTE"):
            additions[f"{project}_ALLOW_RUN_AS_ROOT"] = "1"
            additions[f"{project}_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    return additions
