"""What a host is, as its agent found it (see `host_side.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsllm.launch.hostfile import Host


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU."""

    pid: int
    name: str
    user: str | None
    """None where the process is not to be seen, as from within a container."""
    used_bytes: int


@dataclass(frozen=True)
class GpuFacts:
    """One GPU as it is now."""

    index: int
    """The driver's number of it."""
    name: str
    memory_bytes: int
    free_bytes: int
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True)
class Facts:
    """One host."""

    host_name: str
    """Its own idea of it."""
    user: str
    python: str
    executable: str
    versions: Mapping[str, str | None]
    """Of installed packages by name, CUDA as torch was built for it and NCCL among them; None: not installed."""
    dsllm_version: str | None
    dsllm_hash: str | None
    """Of the sources that ranks there would import; None where there are none."""
    spec_hash: str | None
    cores: int
    memory_bytes: int
    available_bytes: int
    shared_memory_bytes: int
    """Of /dev/shm; 0 where there is none."""
    driver: str | None
    driver_error: str | None
    """What nvidia-smi said where it failed; None also where there is none."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES as a session there has it; None where it is not set."""
    gpus: tuple[GpuFacts, ...] = field(default=())
    """Those that ranks there may use, by slot."""

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Facts:
        """Of what the host's agent answered."""
        gpus = tuple(
            GpuFacts(**{**gpu, "processes": tuple(GpuProcess(**process) for process in gpu["processes"])})
            for gpu in answer["gpus"]
        )
        return cls(**{**answer, "gpus": gpus})

    def devices(self, host: Host) -> str | None:
        """What CUDA_VISIBLE_DEVICES has to be for the ranks on the slots of `host`; None where nothing limits them.

        For a launcher that sets it to the slots themselves, as DeepSpeed's does, or that leaves it as it is.
        """
        if self.visible is None:
            return None if host.chosen is None else ",".join(map(str, host.slot_ids))
        names = [name.strip() for name in self.visible.split(",")]
        return ",".join(names[slot] for slot in host.slot_ids if slot < len(names))


LAUNCHER = "this machine"
"""In the place of a host's name, which has no space."""


@dataclass(frozen=True)
class FolderFacts:
    """A folder as one host sees it."""

    error: str | None
    """Why nothing can be written there."""
    free_bytes: int
    file_system: str
    checkpoints: int
    """Complete ones in it."""
    seen: tuple[str, ...] = ()
    """Hosts whose file there it sees, its own among them, and LAUNCHER."""


@dataclass(frozen=True)
class Pair:
    """The link between two hosts; of the two directions the worse."""

    first: str
    second: str
    latency_seconds: float
    """One way, of a message of a few bytes."""
    bytes_per_second: float


@dataclass(frozen=True)
class Links:
    """What was measured between the hosts, one rank on each."""

    backend: str
    all_reduce_latency_seconds: float
    """Of a few bytes, the median."""
    bus_bytes_per_second: float
    """Of a large all-reduce: 2(n-1)/n x bytes / seconds, what each host has to send, as NCCL's tests have it."""
    pairs: tuple[Pair, ...]
    num_pairs: int
    """That there are; more than were measured where the time did not suffice."""

    @classmethod
    def from_output(cls, output: Mapping[str, Any], hosts: Sequence[str]) -> Links:
        """Of what rank 0 of `dsllm.engine.links` printed; `hosts` by rank."""
        pairs = tuple(
            Pair(hosts[first], hosts[second], latency, bandwidth)
            for first, second, latency, bandwidth in output["pairs"]
        )
        return cls(**{**output, "pairs": pairs})
