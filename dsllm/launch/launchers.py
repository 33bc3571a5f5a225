"""The commands that start ranks: DeepSpeed's launcher on this machine, and the ways to several hosts."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from dsllm.errors import UserError
from dsllm.launch.hosts import SSH_OPTIONS, Way, on_this_machine, over_ssh, shell_line
from dsllm.launch.mpi import mpirun_command, mpirun_environment
from dsllm.launch.slurm import srun_command, srun_one
from dsllm.launch.topology import Topology, is_this_machine

TRAIN_SCRIPT = Path(__file__).parent.parent / "train.py"
Launcher = Literal["local", "pdsh", "ssh", "slurm", "openmpi", "torchrun"]
LAUNCHERS: tuple[Launcher, ...] = get_args(Launcher)
DEEPSPEED_FORWARDS = ("PYTHON", "NCCL", "MV2", "UCX", "MLFLOW")
"""Variables that begin so are put on pdsh's command line, where every user of a host reads them; ours travel in a
private file. (deepspeed/launcher/runner.py, EXPORT_ENVS, and the accelerators' own)"""
JOB_HOSTFILE = Path("/job/hostfile")
"""What DeepSpeed reads where it is given no hostfile."""


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one start meet."""

    address: str
    port: int


@dataclass(frozen=True)
class Start:
    """A command of this machine that starts ranks, and ends with them."""

    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """What it needs besides this process's own."""
    without: tuple[str, ...] = ()
    """Beginnings of the names of variables that it must not have."""
    host: str | None = None
    """Where its ranks are, if it starts those of one host of several."""
    is_labelled: bool = False
    """Whether it puts the host's name before each line of its ranks."""
    hands_signals_on: bool = False
    """Whether it hands SIGUSR1 and SIGUSR2 to its ranks, wherever those are."""

    def as_typed(self) -> str:
        """As it would be typed into a shell."""
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.command])


def choose_launcher(given: str | None, topology: Topology, is_dry: bool = False) -> Launcher:
    """The launcher of that name, or the one that fits: DeepSpeed's own for this machine alone, Slurm's for the hosts of
    a Slurm job, for those of a hostfile pdsh where it is installed, else ssh.

    Raises UserError where it is unknown, cannot start what is asked for or, unless `is_dry`, is not installed here.
    """
    if given is None:
        return _fitting_launcher(topology)
    launcher = next((name for name in LAUNCHERS if name == given), None)
    if launcher is None:
        raise UserError(f"--launcher: given '{given}'; must be one of {', '.join(LAUNCHERS)}")
    _refuse_for_hosts(launcher, topology)
    if not is_dry:
        _refuse_here(launcher)
    return launcher


def _fitting_launcher(topology: Topology) -> Launcher:
    if topology.is_local:
        return "local"
    if topology.hostfile is None:
        return "slurm"
    is_fit_for_pdsh = shutil.which("pdsh") and _ipv6_address(topology) is None and _unfit_for_pdsh() is None
    return "pdsh" if is_fit_for_pdsh else "ssh"


def _refuse_for_hosts(launcher: Launcher, topology: Topology) -> None:
    """Raises UserError where the launcher cannot start ranks on these hosts."""
    if launcher == "local" and not topology.is_local:
        raise UserError("--launcher: given local, which starts ranks on this machine alone; leave it out for others")
    if launcher in ("pdsh", "ssh") and topology.is_local:
        raise UserError(f"--launcher: given {launcher} for this machine alone; add --hostfile, which names other hosts")
    if launcher == "slurm" and (topology.hostfile is not None or topology.is_local):  # local: it names this machine
        raise UserError("--launcher: given slurm with a hostfile; leave --hostfile out: the Slurm job has its hosts")
    address = _ipv6_address(topology)
    if launcher in ("pdsh", "openmpi") and address is not None:  # as DeepSpeed's --include and mpirun read a colon
        raise UserError(
            f"--launcher: given {launcher}, which takes no IPv6 address such as {address} for a host; "
            "name it in /etc/hosts, or give --launcher ssh"
        )


def _refuse_here(launcher: Launcher) -> None:
    """Raises UserError where the launcher is not installed on this machine, or cannot start from this folder."""
    if launcher == "pdsh" and not shutil.which("pdsh"):
        raise UserError("--launcher: given pdsh, which is not installed here; apt-get install pdsh, or --launcher ssh")
    if launcher == "pdsh" and (path := _unfit_for_pdsh()) is not None:
        raise UserError(
            f"--launcher: given pdsh, to which DeepSpeed hands '{path}' as it is; start from a path of letters, digits "
            "and -_./ alone, or with --launcher ssh"
        )
    if launcher == "openmpi" and not shutil.which("mpirun"):
        raise UserError("--launcher: given openmpi, but no mpirun is on the PATH; install Open MPI, or leave it out")


def _ipv6_address(topology: Topology) -> str | None:
    return next((name for name in topology.names if ":" in name), None)


def _unfit_for_pdsh() -> Path | None:
    """A path that the shell on a host would not read as it is: DeepSpeed quotes neither the folder, where ranks would
    then start in the home, nor the interpreter and the script. (deepspeed/launcher/multinode_runner.py, PDSHRunner)"""
    paths = (Path.cwd(), Path(sys.executable), TRAIN_SCRIPT)
    return next((path for path in paths if "%" in str(path) or shlex.quote(str(path)) != str(path)), None)


def way_to_hosts(launcher: Launcher, topology: Topology) -> Way:
    """How the hosts of a launch are asked and, where the launcher does not do it itself, started."""
    if topology.is_local:
        return on_this_machine
    if launcher == "slurm":
        return srun_one
    if launcher in ("ssh", "torchrun", "openmpi"):
        return lambda host, line: (on_this_machine if is_this_machine(host) else over_ssh)(host, line)
    return over_ssh  # as pdsh goes, to this machine too


def starts(
    launcher: Launcher, topology: Topology, meeting: Meeting, arguments: Sequence[str], folder: Path
) -> list[Start]:
    """What starts `dsllm/train.py` with `arguments` on every rank of the topology, in `folder` on every host."""
    return _STARTS[launcher](topology, meeting, arguments, folder)


def train_arguments(
    spec: str,
    run_dir: str | None,
    resume: str,
    overrides: Sequence[str],
    stop_after: str | None = None,
    environment_file: str | None = None,
) -> list[str]:
    """What `dsllm/train.py` is started with; defaults are left out."""
    arguments = ["--spec", spec]
    if run_dir is not None:
        arguments += ["--run-dir", run_dir]
    if resume != "auto":
        arguments += ["--resume", resume]
    if stop_after is not None:
        arguments += ["--stop-after", stop_after]
    if environment_file is not None:
        arguments += ["--environment-file", environment_file]
    for override in overrides:
        arguments += ["--set", override]
    return arguments


def _local(topology: Topology, meeting: Meeting, arguments: Sequence[str], folder: Path) -> list[Start]:
    command = [deepspeed_executable()]
    if JOB_HOSTFILE.is_file():
        command += ["--hostfile", "/dev/null"]
    environment = local_environment(topology)
    if "CUDA_VISIBLE_DEVICES" not in environment:
        command += ["--num_gpus", str(topology.ranks_per_host)]
    command += ["--master_port", str(meeting.port)]
    command += ["--log_level", "error"]  # its lines of information would bury the run's own
    return [Start([*command, str(TRAIN_SCRIPT), *arguments], environment)]


def local_environment(topology: Topology) -> dict[str, str]:
    """What ranks on this machine need besides its own environment.

    A CPU has to be named where CUDA's libraries are installed. A selection of GPUs is narrowed to the ranks, since
    DeepSpeed drops CUDA_VISIBLE_DEVICES as soon as it is told a number of them.
    """
    if topology.on_cpu:
        return {"DS_ACCELERATOR": "cpu"}
    if topology.devices:
        return {"CUDA_VISIBLE_DEVICES": ",".join(topology.devices[: topology.ranks_per_host])}
    return {}


def _pdsh(topology: Topology, meeting: Meeting, arguments: Sequence[str], folder: Path) -> list[Start]:
    """DeepSpeed's own start of several hosts."""
    assert topology.hostfile is not None
    command = [deepspeed_executable(), "--hostfile", topology.hostfile, *_chosen_hosts(topology)]
    command += ["--launcher", "pdsh"]
    command.append("--force_multi")  # DeepSpeed runs a single host here, whatever its name
    command.append("--no_ssh_check")  # of the first host alone; every one has been asked
    command += ["--master_addr", meeting.address, "--master_port", str(meeting.port)]
    command += ["--log_level", "error"]
    environment = {
        "PDSH_SSH_ARGS_APPEND": " ".join([*os.environ.get("PDSH_SSH_ARGS_APPEND", "").split(), *SSH_OPTIONS]),
        "DS_ENV_FILE": "/dev/null",  # what stands in .deepspeed_env travels with the rest, and on no command line
    }
    line = [*command, str(TRAIN_SCRIPT), *map(_for_pdsh, arguments)]
    return [Start(line, environment, without=DEEPSPEED_FORWARDS, is_labelled=True)]


def _chosen_hosts(topology: Topology) -> list[str]:
    """DeepSpeed's options for these hosts of the hostfile, and these of their slots; none for all."""
    if topology.hosts == topology.listed:
        return []
    hosts = (f"{host.name}:{','.join(map(str, host.slot_ids))}" for host in topology.hosts)
    return ["--include", "@".join(hosts)]


def _for_pdsh(argument: str) -> str:
    """So that the shell on the host reads `argument`: pdsh joins its words with spaces, and replaces what follows a %.

    DeepSpeed puts an argument with a space into double quotes, and escapes the double quotes in it, nothing else.
    (deepspeed/launcher/multinode_runner.py, PDSHRunner)
    """
    argument = argument.replace("%", "%%")
    if " " not in argument:
        return shlex.quote(argument)
    for special in ("\\", "$", "`"):
        argument = argument.replace(special, "\\" + special)
    return argument


def _ssh(topology: Topology, meeting: Meeting, arguments: Sequence[str], folder: Path) -> list[Start]:
    """What DeepSpeed's launcher would start on each host, without pdsh."""
    world = {host.name: list(host.slot_ids) for host in topology.hosts}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    starter = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}"]
    meet = [f"--master_addr={meeting.address}", f"--master_port={meeting.port}", "--log_level=error"]

    def on_host(number: int) -> list[str]:
        return [*starter, f"--node_rank={number}", *meet, str(TRAIN_SCRIPT), *arguments]

    return _on_each_host("ssh", topology, folder, on_host)


def _torchrun(topology: Topology, meeting: Meeting, arguments: Sequence[str], folder: Path) -> list[Start]:
    """torch's launcher on each host."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={topology.num_hosts}"]
    command += [f"--nproc-per-node={topology.ranks_per_host}"]
    meet = [f"--master-addr={meeting.address}", f"--master-port={meeting.port}"]

    def on_host(number: int) -> list[str]:
        return [*command, f"--node-rank={number}", *meet, str(TRAIN_SCRIPT), *arguments]

    if topology.is_local:
        return [Start(on_host(0), local_environment(topology))]
    return _on_each_host("torchrun", topology, folder, on_host)


def _on_each_host(
    launcher: Launcher, topology: Topology, folder: Path, on_host: Callable[[int], list[str]]
) -> list[Start]:
    way = way_to_hosts(launcher, topology)
    return [
        Start(way(name, shell_line(folder, on_host(number))), host=name) for number, name in enumerate(topology.names)
    ]


def _slurm(topology: Topology, meeting: Meeting, arguments: Sequence[str], folder: Path) -> list[Start]:
    """Slurm hands the environment on by itself, on no command line."""
    command = [sys.executable, "-u", str(TRAIN_SCRIPT), *arguments]
    return [Start(srun_command(topology.hosts, topology.ranks_per_host, command), hands_signals_on=True)]


def _openmpi(topology: Topology, meeting: Meeting, arguments: Sequence[str], folder: Path) -> list[Start]:
    command = [sys.executable, "-u", str(TRAIN_SCRIPT), *arguments]
    environment = {**mpirun_environment(), **(local_environment(topology) if topology.is_local else {})}
    return [Start(mpirun_command(topology.hosts, topology.ranks_per_host, command), environment)]


_STARTS: dict[Launcher, Callable[[Topology, Meeting, Sequence[str], Path], list[Start]]] = {
    "local": _local,
    "pdsh": _pdsh,
    "ssh": _ssh,
    "slurm": _slurm,
    "openmpi": _openmpi,
    "torchrun": _torchrun,
}


def deepspeed_executable() -> str:
    """The `deepspeed` beside this Python, so that launcher and ranks run the same installation; else that on PATH."""
    beside = Path(sys.executable).parent / "deepspeed"
    return str(beside) if beside.is_file() else "deepspeed"
