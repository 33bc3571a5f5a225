"""The commands that start ranks, for every launcher."""

from __future__ import annotations

import ast
import base64
import json
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsllm.errors import UserError
from dsllm.launch import launchers
from dsllm.launch.hostfile import Host
from dsllm.launch.hosts import on_this_machine, over_ssh
from dsllm.launch.launchers import (
    DEEPSPEED_FORWARDS,
    LAUNCHERS,
    TRAIN_SCRIPT,
    Launcher,
    Meeting,
    Start,
    choose_launcher,
    deepspeed_executable,
    local_environment,
    starts,
    train_arguments,
    way_to_hosts,
)
from dsllm.launch.slurm import srun_one
from dsllm.launch.topology import Topology, local_topology

LISTED = (Host("a", 8), Host("b", 8))
HOSTFILE = Topology(LISTED, hostfile="hosts", listed=LISTED)
IN_JOB = Topology(LISTED)
BY_IPV6 = Topology((Host("fd00::1", 8),), hostfile="hosts")
LOCAL = Topology((Host("localhost", 4),), is_local=True, on_cpu=False)
MEETING = Meeting("10.0.0.1", 29501)
ARGUMENTS = ["--spec", "my spec.yaml"]
ANY_ARGUMENT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20)
HARD_CHARACTERS = st.text(st.sampled_from(" \"'\\$`%!*~#&;|<>(){}[]?\nab=n"), max_size=12)


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(launchers, "JOB_HOSTFILE", Path("/nowhere/hostfile"))


def start_all(launcher: Launcher, topology: Topology, arguments: list[str] = ARGUMENTS) -> list[Start]:
    return starts(launcher, topology, MEETING, arguments, Path("/srv/my runs"))


def start_one(launcher: Launcher, topology: Topology) -> Start:
    (start,) = start_all(launcher, topology)
    return start


def install(monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    """Only these are on the PATH."""
    monkeypatch.setattr(launchers.shutil, "which", lambda name: f"/bin/{name}" if name in programs else None)


# --- which launcher --------------------------------------------------------------------------------------------------


def test_the_launcher_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "pdsh")
    assert choose_launcher(None, LOCAL) == "local"
    assert choose_launcher(None, HOSTFILE) == "pdsh"
    assert choose_launcher(None, IN_JOB) == "slurm"
    assert choose_launcher(None, BY_IPV6) == "ssh"
    install(monkeypatch)
    assert choose_launcher(None, HOSTFILE) == "ssh"


@pytest.mark.parametrize(
    ("given", "topology", "fits"),
    [
        ("local", LOCAL, True),
        ("torchrun", LOCAL, True),
        ("openmpi", LOCAL, True),
        ("pdsh", HOSTFILE, True),
        ("ssh", HOSTFILE, True),
        ("torchrun", HOSTFILE, True),
        ("openmpi", HOSTFILE, True),
        ("slurm", IN_JOB, True),
        ("local", HOSTFILE, False),
        ("local", IN_JOB, False),
        ("pdsh", LOCAL, False),
        ("ssh", LOCAL, False),
        ("slurm", HOSTFILE, False),
        ("slurm", LOCAL, False),
    ],
)
def test_a_launcher_is_taken_where_it_can_start_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, given: str, topology: Topology, fits: bool
) -> None:
    install(monkeypatch, "pdsh", "mpirun")
    if fits:
        assert choose_launcher(given, topology) == given
    else:
        with pytest.raises(UserError, match=f"--launcher: given {given}"):
            choose_launcher(given, topology)


@pytest.mark.parametrize(
    ("given", "topology", "message"),
    [
        ("magic", LOCAL, "--launcher: given 'magic'; must be one of local, pdsh, ssh, slurm, openmpi, torchrun"),
        ("local", HOSTFILE, "--launcher: given local, which starts ranks on this machine alone; leave it out"),
        ("ssh", LOCAL, "--launcher: given ssh for this machine alone; add --hostfile, which names other hosts"),
        ("slurm", HOSTFILE, "--launcher: given slurm with a hostfile; leave --hostfile out: the Slurm job has its"),
        ("pdsh", BY_IPV6, "--launcher: given pdsh, which takes no IPv6 address such as fd00::1 for a host; name it in"),
        ("openmpi", BY_IPV6, "--launcher: given openmpi, which takes no IPv6 address such as fd00::1 for a host; name"),
        ("pdsh", HOSTFILE, "--launcher: given pdsh, which is not installed here; apt-get install pdsh, or --launcher"),
        ("openmpi", LOCAL, "--launcher: given openmpi, but no mpirun is on the PATH; install Open MPI, or leave it"),
    ],
)
def test_a_launcher_that_cannot_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, given: str, topology: Topology, message: str
) -> None:
    install(monkeypatch)
    with pytest.raises(UserError) as refusal:
        choose_launcher(given, topology)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("name", ["my runs", "it's", "100%n", "$HOME"])
def test_pdsh_is_not_used_where_deepspeed_would_hand_it_a_path_that_it_tears_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    install(monkeypatch, "pdsh")
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert choose_launcher(None, HOSTFILE) == "ssh"
    with pytest.raises(UserError) as refusal:
        choose_launcher("pdsh", HOSTFILE)
    assert str(refusal.value) == (
        f"--launcher: given pdsh, to which DeepSpeed hands '{tmp_path / name}' as it is; start from a path of letters, "
        "digits and -_./ alone, or with --launcher ssh"
    )


def test_hosts_are_asked_the_way_that_the_launcher_goes() -> None:
    assert way_to_hosts("torchrun", LOCAL) is on_this_machine
    assert way_to_hosts("slurm", IN_JOB) is srun_one
    assert way_to_hosts("pdsh", HOSTFILE)("localhost", "true") == over_ssh("localhost", "true")
    for launcher in ("ssh", "torchrun", "openmpi"):
        way = way_to_hosts(launcher, HOSTFILE)
        assert way("localhost", "true") == ["sh", "-c", "true"]
        assert way("b", "true")[0] == "ssh"
        assert way("b", "true")[-2:] == ["b", "true"]


# --- on this machine -------------------------------------------------------------------------------------------------


def test_a_local_command_names_its_ranks_its_port_and_the_installed_script() -> None:
    start = start_one("local", local_topology(4, gpus=8))
    assert start.command[1:5] == ["--num_gpus", "4", "--master_port", "29501"]
    assert start.command[-3:] == [str(TRAIN_SCRIPT), *ARGUMENTS]
    assert (start.host, start.is_labelled, start.without) == (None, False, ())


def test_the_launcher_is_the_one_beside_this_python() -> None:
    beside = Path(sys.executable).parent / "deepspeed"
    assert deepspeed_executable() == (str(beside) if beside.exists() else "deepspeed")


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_without_a_gpu_ranks_are_told_to_use_the_cpu(launcher: Launcher) -> None:
    assert start_one(launcher, local_topology(2, gpus=0)).environment == {"DS_ACCELERATOR": "cpu"}
    assert start_one(launcher, local_topology(2, gpus=2)).environment == {}


def test_a_selection_of_gpus_is_narrowed_and_no_number_drops_it() -> None:
    topology = Topology((Host("localhost", 2),), is_local=True, devices=("4", "5", "7"), on_cpu=False)
    start = start_one("local", topology)
    assert start.environment == local_environment(topology) == {"CUDA_VISIBLE_DEVICES": "4,5"}
    assert "--num_gpus" not in start.command


def test_a_hostfile_of_the_machine_does_not_lead_a_local_start_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hostfile").write_text("elsewhere slots=8\n")
    monkeypatch.setattr(launchers, "JOB_HOSTFILE", tmp_path / "hostfile")
    assert start_one("local", LOCAL).command[1:3] == ["--hostfile", "/dev/null"]


def test_torchrun_on_this_machine_meets_where_it_is_told() -> None:
    assert start_one("torchrun", LOCAL).command == [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=4"),
        *("--node-rank=0", "--master-addr=10.0.0.1", "--master-port=29501", str(TRAIN_SCRIPT), *ARGUMENTS),
    ]


# --- on several hosts ------------------------------------------------------------------------------------------------


def test_pdsh_is_deepspeeds_own_start_of_the_hostfile() -> None:
    start = start_one("pdsh", HOSTFILE)
    command = start.command
    assert command[1:4] == ["--hostfile", "hosts", "--launcher"]
    assert {"--force_multi", "--no_ssh_check"} <= set(command)
    assert command[command.index("--master_addr") + 1] == "10.0.0.1"
    assert command[command.index("--master_port") + 1] == "29501"
    assert command[-3:] == [str(TRAIN_SCRIPT), "--spec", "my spec.yaml"]
    assert start.is_labelled
    assert "BatchMode=yes" in start.environment["PDSH_SSH_ARGS_APPEND"]


def test_no_variable_of_the_user_goes_over_pdsh_on_a_command_line() -> None:
    from deepspeed.launcher import runner

    start = start_one("pdsh", HOSTFILE)
    assert set(runner.EXPORT_ENVS) <= set(DEEPSPEED_FORWARDS) == set(start.without)
    assert start.environment["DS_ENV_FILE"] == "/dev/null"


def test_pdsh_is_told_the_hosts_and_slots_that_are_left() -> None:
    fewer = Topology((Host("a", 2, (1, 3)), Host("b", 2)), hostfile="hosts", listed=LISTED)
    command = start_one("pdsh", fewer).command
    assert command[command.index("--include") + 1] == "a:1,3@b:0,1"


def test_ssh_starts_on_each_host_what_deepspeed_would() -> None:
    all_starts = start_all("ssh", Topology((Host("a", 2, (1, 3)), Host("b", 2)), hostfile="hosts", listed=LISTED))
    assert [start.host for start in all_starts] == ["a", "b"]
    for number, start in enumerate(all_starts):
        assert start.command[:1] + start.command[-2:-1] == ["ssh", "ab"[number]]
        words = shlex.split(start.command[-1])
        assert words[:4] == ["cd", "/srv/my runs", "&&", "exec"]
        assert words[5:8] == ["-u", "-m", "deepspeed.launcher.launch"]
        encoded = words[8].removeprefix("--world_info=")
        assert json.loads(base64.urlsafe_b64decode(encoded)) == {"a": [1, 3], "b": [0, 1]}
        assert words[9:13] == [
            *(f"--node_rank={number}", "--master_addr=10.0.0.1", "--master_port=29501", "--log_level=error")
        ]
        assert words[13:] == [str(TRAIN_SCRIPT), *ARGUMENTS]


def test_a_path_of_packages_goes_along_to_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/my packages")
    words = shlex.split(start_all("ssh", HOSTFILE)[0].command[-1])
    assert words[3:6] == ["exec", "env", "PYTHONPATH=/my packages"]


def test_torchrun_on_several_hosts_numbers_them() -> None:
    lines = [shlex.split(start.command[-1]) for start in start_all("torchrun", HOSTFILE)]
    assert [line[9] for line in lines] == ["--node-rank=0", "--node-rank=1"]
    assert {tuple(line[7:9]) for line in lines} == {("--nnodes=2", "--nproc-per-node=8")}


def test_this_machine_among_several_needs_no_ssh() -> None:
    topology = Topology((Host("localhost", 2), Host("b", 2)), hostfile="hosts")
    here, there = start_all("ssh", topology)
    assert (here.command[:2], here.host) == (["sh", "-c"], "localhost")
    assert there.command[0] == "ssh"


def test_slurm_and_openmpi_start_every_rank_with_one_command() -> None:
    slurm, openmpi = start_one("slurm", IN_JOB), start_one("openmpi", HOSTFILE)
    rank = [sys.executable, "-u", str(TRAIN_SCRIPT), *ARGUMENTS]
    assert "srun" in slurm.command
    assert openmpi.command[:3] == ["mpirun", "-np", "16"]
    assert slurm.command[-len(rank) :] == openmpi.command[-len(rank) :] == rank
    assert slurm.hands_signals_on
    assert slurm.environment == {}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_start_can_be_typed_as_it_is_shown(launcher: Launcher) -> None:
    topology = {"local": LOCAL, "slurm": IN_JOB}.get(launcher, HOSTFILE)
    for start in start_all(launcher, topology):
        words = shlex.split(start.as_typed())
        assert words[: len(start.environment)] == [f"{name}={value}" for name, value in start.environment.items()]
        assert words[len(start.environment) :] == start.command


# --- arguments -------------------------------------------------------------------------------------------------------


def test_train_arguments_leave_defaults_out_and_keep_the_order_of_overrides() -> None:
    assert train_arguments("1b", None, "auto", []) == ["--spec", "1b"]
    assert train_arguments("1b", "out", "never", ["seed=1", "zero.stage=3"]) == (
        ["--spec", "1b", "--run-dir", "out", "--resume", "never", "--set", "seed=1", "--set", "zero.stage=3"]
    )
    assert train_arguments("1b", None, "auto", [], "3h50m", "/tmp/e") == (
        ["--spec", "1b", "--stop-after", "3h50m", "--environment-file", "/tmp/e"]
    )


def through_pdsh(arguments: list[str]) -> list[str]:
    """What arguments come to on a host: DeepSpeed's own quoting, pdsh's replacing of %, and the host's shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = PDSHRunner.__new__(PDSHRunner)
    runner.args = Namespace(user_args=[launchers._for_pdsh(argument) for argument in arguments])
    line = " ".join(runner.parse_user_args()).replace("%%", "\0")
    assert "%" not in line, "pdsh would replace it"
    shown = f'{sys.executable} -c "import sys; print(ascii(sys.argv[1:]))" '
    ran = subprocess.run(["sh", "-c", shown + line.replace("\0", "%")], capture_output=True, text=True, check=True)
    return ast.literal_eval(ran.stdout)


@settings(max_examples=60, deadline=None)
@given(arguments=st.lists(HARD_CHARACTERS | ANY_ARGUMENT, max_size=8))
@example(arguments=["--set", 'data={sources: [{kind: text, path: "a b"}]}', "", "100%n", "$HOME `id` \\", "a'b", "\n"])
def test_every_argument_arrives_as_it_is_through_pdsh(arguments: list[str]) -> None:
    assert through_pdsh(arguments) == arguments


@settings(max_examples=40, deadline=None)
@given(arguments=st.lists(HARD_CHARACTERS | ANY_ARGUMENT, max_size=8))
def test_every_argument_arrives_as_it_is_through_ssh(arguments: list[str]) -> None:
    """ssh hands one line to the host's shell, as `sh -c` reads it."""
    (start,) = start_all("ssh", Topology((Host("localhost", 2),), hostfile="hosts"), arguments)
    shown = f'{sys.executable} -c "import sys; print(ascii(sys.argv[1:]))"'
    line = start.command[-1].partition(" && exec ")[2]
    ran = subprocess.run(["sh", "-c", f"{shown} {line}"], capture_output=True, text=True, check=True)
    words = ast.literal_eval(ran.stdout)
    assert words[words.index(str(TRAIN_SCRIPT)) + 1 :] == arguments
