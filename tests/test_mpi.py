"""The command of Open MPI, started for real where it is installed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from dsllm.errors import UserError
from dsllm.launch.hostfile import Host
from dsllm.launch.mpi import mpirun_command, mpirun_environment


def test_ranks_are_placed_on_the_hosts_in_their_order() -> None:
    command = mpirun_command([Host("b", 8), Host("a", 8)], 4, ["python", "train.py"])
    assert " ".join(command) == "mpirun -np 8 --host b:4,a:4 --map-by ppr:4:node --bind-to none python train.py"


def test_an_address_with_colons_is_refused() -> None:
    with pytest.raises(UserError, match="host 'fe80::1': given with --launcher openmpi, whose mpirun takes no"):
        mpirun_command([Host("a", 8), Host("fe80::1", 8)], 8, ["true"])


def test_root_is_allowed_only_where_it_is_root() -> None:
    as_user, as_root = mpirun_environment(is_root=False), mpirun_environment(is_root=True)
    assert not any("ALLOW" in name for name in as_user)
    assert as_root == {
        **as_user,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_ALLOW_RUN_AS_ROOT": "1",
        "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_open_mpi_starts_the_ranks_and_ends_them_when_one_fails(tmp_path: Path) -> None:
    script = tmp_path / "rank.sh"
    script.write_text(
        "echo rank $OMPI_COMM_WORLD_RANK, local $OMPI_COMM_WORLD_LOCAL_RANK, of $OMPI_COMM_WORLD_SIZE\n"
        'if [ "$1" = fail ] && [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then exit 3; fi\n'
        'if [ "$1" = fail ]; then exec sleep 100; fi\n'
    )
    environment = {**os.environ, **mpirun_environment()}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = mpirun_command([Host("localhost", 2)], 2, ["sh", str(script), *arguments])
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )

    good, bad = run(), run("fail")
    assert (good.returncode, sorted(good.stdout.splitlines())) == (
        0,
        ["rank 0, local 0, of 2", "rank 1, local 1, of 2"],
    )
    assert bad.returncode == 3


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_open_mpi_hands_the_signal_to_stop_on_to_every_rank() -> None:
    script = "trap 'echo asked to stop; exit 0' USR2; echo ready; while true; do sleep 0.1; done"
    launcher = subprocess.Popen(
        mpirun_command([Host("localhost", 2)], 2, ["sh", "-c", script]),
        env={**os.environ, **mpirun_environment()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert launcher.stdout is not None
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    launcher.send_signal(signal.SIGUSR2)
    printed, _ = launcher.communicate(timeout=60)
    assert (launcher.returncode, printed) == (0, "asked to stop\n" * 2)
