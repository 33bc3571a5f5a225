"""The `deepspeed` command that starts a run, and the machine that it starts on."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsllm.errors import UserError
from dsllm.launch.hostfile import Host

TRAIN_SCRIPT = Path(__file__).parent.parent / "train.py"
DEFAULT_CPU_RANKS = 2


@dataclass(frozen=True)
class Topology:
    """Where ranks run: on this machine, or on the hosts of a hostfile."""

    ranks_per_host: int
    num_hosts: int = 1
    hostfile: str | None = None
    limits_slots: bool = True
    """Whether the number of ranks has to be told, rather than left to the hostfile's slots."""
    is_remote: bool = False
    """Whether the only host is another machine."""
    devices: tuple[str, ...] = ()
    """The GPUs that CUDA_VISIBLE_DEVICES selects, where it is set."""
    on_cpu: bool = False

    @property
    def world_size(self) -> int:
        return self.ranks_per_host * self.num_hosts


def selected_devices() -> tuple[str, ...] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES lists; None where it is not set, and every GPU may be used."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return None
    return tuple(device.strip() for device in listed.split(",") if device.strip() not in ("", "-1"))


def count_gpus() -> int:
    """NVIDIA GPUs of this machine that a run may use, counted without torch; 0 where there is no driver."""
    selected = selected_devices()
    if selected is not None:
        return len(selected)
    if shutil.which("nvidia-smi"):
        result = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
        return sum(line.startswith("GPU ") for line in result.stdout.splitlines())
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def local_topology(num_gpus: int | None, gpus: int) -> Topology:
    """This machine, with `gpus` GPUs: all of them unless fewer are asked for; without any, ranks on the CPU.

    Raises UserError where more are asked for than there are; DeepSpeed would start them and fail on the first.
    """
    if gpus == 0:
        cores = os.cpu_count() or 1
        return Topology(ranks_per_host=num_gpus or min(DEFAULT_CPU_RANKS, cores), on_cpu=True)
    if num_gpus is not None and num_gpus > gpus:
        raise UserError(f"--num-gpus: given {num_gpus}; this machine has {gpus}; ask for {gpus} or fewer")
    return Topology(ranks_per_host=num_gpus or gpus, devices=selected_devices() or ())


def hostfile_topology(
    hostfile: str, hosts: Sequence[Host], num_nodes: int | None, num_gpus: int | None, gpus: int
) -> Topology:
    """The hosts of a hostfile, the first `num_nodes` of them, each with `num_gpus` ranks or as many as it has slots.

    `gpus` is what this machine has: the others are taken to be alike.

    Raises UserError where hosts or slots are fewer than asked for, or differ: DeepSpeed checks neither.
    """
    if num_nodes is not None and num_nodes > len(hosts):
        raise UserError(
            f"--num-nodes: given {num_nodes}; {hostfile} lists {len(hosts)} hosts; ask for as many or fewer"
        )
    used = list(hosts[:num_nodes])
    ranks = _ranks_per_host(hostfile, used, num_gpus)
    if len(used) == 1 and is_this_machine(used[0].name):
        return local_topology(ranks, gpus)  # needs no ssh to itself
    return Topology(
        ranks_per_host=ranks,
        num_hosts=len(used),
        hostfile=hostfile,
        limits_slots=num_gpus is not None,
        is_remote=len(used) == 1,
        on_cpu=gpus == 0,
    )


def _ranks_per_host(hostfile: str, hosts: Sequence[Host], num_gpus: int | None) -> int:
    fewest = min(hosts, key=lambda host: host.slots)
    if num_gpus is None and any(host.slots != fewest.slots for host in hosts):
        slots = ", ".join(f"{host.name} {host.slots}" for host in hosts)
        raise UserError(
            f"{hostfile}: hosts with different slots ({slots}) need one number of ranks; add --num-gpus {fewest.slots}"
        )
    if num_gpus is not None and num_gpus > fewest.slots:
        raise UserError(
            f"--num-gpus: given {num_gpus}; host '{fewest.name}' of {hostfile} has {fewest.slots} slots; "
            f"ask for {fewest.slots} or fewer"
        )
    return num_gpus or fewest.slots


def is_this_machine(host: str) -> bool:
    """Whether a name in a hostfile means this machine."""
    return host in {"localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn()}


def launch_command(topology: Topology, master_port: int, train_arguments: Sequence[str]) -> list[str]:
    """The arguments of the `deepspeed` launcher that belongs to this Python."""
    command = [deepspeed_executable()]
    if topology.hostfile is not None:
        command += ["--hostfile", topology.hostfile, "--num_nodes", str(topology.num_hosts)]
    if topology.is_remote:
        command.append("--force_multi")  # DeepSpeed runs a single host here, whatever its name
    if topology.limits_slots and not topology.devices:
        command += ["--num_gpus", str(topology.ranks_per_host)]
    command += ["--master_port", str(master_port)]
    command += ["--log_level", "error"]  # its lines of information would bury the run's own
    return [*command, str(TRAIN_SCRIPT), *train_arguments]


def train_arguments(
    spec: str, run_dir: str | None, resume: str, overrides: Sequence[str], stop_after: str | None = None
) -> list[str]:
    """What `dsllm/train.py` is started with; defaults are left out."""
    arguments = ["--spec", spec]
    if run_dir is not None:
        arguments += ["--run-dir", run_dir]
    if resume != "auto":
        arguments += ["--resume", resume]
    if stop_after is not None:
        arguments += ["--stop-after", stop_after]
    for override in overrides:
        arguments += ["--set", override]
    return arguments


def launch_environment(topology: Topology) -> dict[str, str]:
    """What the launcher's environment needs besides this one's.

    A CPU has to be named where CUDA's libraries are installed. A selection of GPUs is narrowed to the ranks, since
    DeepSpeed drops CUDA_VISIBLE_DEVICES as soon as it is told a number of them.
    """
    if topology.on_cpu:
        return {"DS_ACCELERATOR": "cpu"}
    if topology.devices:
        return {"CUDA_VISIBLE_DEVICES": ",".join(topology.devices[: topology.ranks_per_host])}
    return {}


def deepspeed_executable() -> str:
    """The `deepspeed` beside this Python, so that launcher and ranks run the same installation; else that on PATH."""
    beside = Path(sys.executable).parent / "deepspeed"
    return str(beside) if beside.is_file() else "deepspeed"
