"""Where ranks run: on this machine, or on the hosts of a hostfile or an allocation."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsllm.errors import UserError
from dsllm.launch.devices import ask_driver
from dsllm.launch.hostfile import Host, read_hostfile, refuse_two_choices, select_hosts

DEFAULT_CPU_RANKS = 2
THIS_MACHINE = "localhost"
DEVICES = Path("/dev")


@dataclass(frozen=True)
class Topology:
    """Hosts that run equally many ranks each: the order of hosts is that of ranks."""

    hosts: tuple[Host, ...]
    hostfile: str | None = None
    """The file that lists them; None for this machine alone, and in an allocation."""
    listed: tuple[Host, ...] = ()
    """All that the hostfile lists."""
    is_local: bool = False
    """Whether the only host is this machine, which needs no way to it."""
    devices: tuple[str, ...] = ()
    """On this machine alone: the GPUs that CUDA_VISIBLE_DEVICES selects, where it is set."""
    on_cpu: bool | None = None
    """Whether ranks compute on the CPU; None until the hosts have been asked."""

    @property
    def ranks_per_host(self) -> int:
        return self.hosts[0].slots

    @property
    def num_hosts(self) -> int:
        return len(self.hosts)

    @property
    def world_size(self) -> int:
        return self.ranks_per_host * self.num_hosts

    @property
    def names(self) -> list[str]:
        """Of the hosts, in the order of ranks."""
        return [host.name for host in self.hosts]


def selected_devices() -> tuple[str, ...] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES lists; None where it is not set, and every GPU may be used."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return None
    return tuple(device.strip() for device in listed.split(",") if device.strip() not in ("", "-1"))


def count_gpus() -> int:
    """NVIDIA GPUs of this machine that a run may use, counted without torch; 0 where there is no driver. One that fails
    or hangs is no reason to train on the CPU: then the kernel's devices count, and ranks say what is wrong."""
    selected = selected_devices()
    if selected is not None:
        return len(selected)
    listed = sum(line.startswith("GPU ") for line in ask_driver("--list-gpus"))
    return listed or len(list(DEVICES.glob("nvidia[0-9]*")))


def local_topology(num_gpus: int | None, gpus: int) -> Topology:
    """This machine, with `gpus` GPUs: all of them unless fewer are asked for; without any, ranks on the CPU.

    Raises UserError where more are asked for than there are; DeepSpeed would start them and fail on the first.
    """
    if gpus == 0:
        ranks = num_gpus or min(DEFAULT_CPU_RANKS, os.cpu_count() or 1)
        return Topology((Host(THIS_MACHINE, ranks),), is_local=True, on_cpu=True)
    if num_gpus is not None and num_gpus > gpus:
        raise UserError(f"--num-gpus: given {num_gpus}; this machine has {gpus}; ask for {gpus} or fewer")
    hosts = (Host(THIS_MACHINE, num_gpus or gpus),)
    return Topology(hosts, is_local=True, devices=selected_devices() or (), on_cpu=False)


def hosts_topology(
    source: str,
    listed: Sequence[Host],
    num_nodes: int | None = None,
    num_gpus: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> Topology:
    """Several hosts, or one that is perhaps another machine: those that `include` or `exclude` choose, or the first
    `num_nodes`, each with `num_gpus` ranks or as many as it has slots. `source` names in messages where they are from.

    Raises UserError where hosts or slots are fewer than asked for, or differ: DeepSpeed checks neither.
    """
    refuse_two_choices(include, exclude, num_nodes, num_gpus)
    if num_nodes is not None and num_nodes > len(listed):
        raise UserError(f"--num-nodes: given {num_nodes}; {source} lists {len(listed)} hosts; ask for as many or fewer")
    used = select_hosts(listed, include, exclude, source)[:num_nodes]
    ranks = _ranks_per_host(source, used, num_gpus, is_chosen=include is not None or exclude is not None)
    return Topology(tuple(_with_ranks(host, ranks) for host in used))


def hostfile_topology(
    hostfile: str,
    num_nodes: int | None = None,
    num_gpus: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
    *,
    gpus: int,
) -> Topology:
    """The hosts of a hostfile; where only this machine is left of them, this machine, which has `gpus` GPUs.

    Raises UserError as `read_hostfile`, `hosts_topology` and `local_topology` do.
    """
    listed = read_hostfile(hostfile)
    topology = hosts_topology(hostfile, listed, num_nodes, num_gpus, include, exclude)
    (first, *others) = topology.hosts
    if not others and is_this_machine(first.name):  # which needs no ssh to itself
        if 0 < gpus < first.slots:
            raise UserError(
                f"{hostfile}: given slots={first.slots} for {first.name}; this machine has {gpus} GPUs; lower them, or "
                f"add --num-gpus {gpus}"
            )
        local = local_topology(first.slots, gpus)
        return local if first.chosen is None or local.on_cpu else replace(local, devices=_devices(first.chosen))
    return replace(topology, hostfile=hostfile, listed=tuple(listed))


def _devices(slot_ids: tuple[int, ...]) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES is to list for these slots: of the GPUs that it lists already, where it does."""
    selected = selected_devices()
    return tuple(str(slot) if selected is None else selected[slot] for slot in slot_ids)


def _with_ranks(host: Host, ranks: int) -> Host:
    if host.chosen is None:
        return Host(host.name, ranks)
    return Host(host.name, ranks, host.chosen[:ranks])


def _ranks_per_host(source: str, hosts: Sequence[Host], num_gpus: int | None, is_chosen: bool) -> int:
    fewest = min(hosts, key=lambda host: host.slots)
    if num_gpus is None and any(host.slots != fewest.slots for host in hosts):
        slots = ", ".join(f"{host.name} {host.slots}" for host in hosts)
        remedy = (
            f"choose as many of each: --include {_as_many(hosts)}" if is_chosen else f"add --num-gpus {fewest.slots}"
        )
        raise UserError(f"{source}: hosts with different slots ({slots}) need one number of ranks; {remedy}")
    if num_gpus is not None and num_gpus > fewest.slots:
        raise UserError(
            f"--num-gpus: given {num_gpus}; host '{fewest.name}' of {source} has {fewest.slots} slots; "
            f"ask for {fewest.slots} or fewer"
        )
    return num_gpus or fewest.slots


def _as_many(hosts: Sequence[Host]) -> str:
    """A choice for `--include` of as many slots of each host as one of them has fewest; the same of all where it can
    be, as Slurm needs it."""
    fewest = min((host.slot_ids for host in hosts), key=len)
    slots = {host.name: fewest if set(fewest) <= set(host.slot_ids) else host.slot_ids[: len(fewest)] for host in hosts}
    return "@".join(f"{name}:{','.join(map(str, ids))}" for name, ids in slots.items())


def is_this_machine(host: str) -> bool:
    """Whether a name in a hostfile means this machine."""
    return host in {"localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn()}
