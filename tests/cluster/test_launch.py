"""`dsllm launch` on real hosts: two train as two ranks of one machine do, and none of their faults is silent."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsllm.launch import agent
from tests.cluster.host import Host
from tests.cluster.isolation import HostProcess, Process, wait_until
from tests.cluster.namespaces import Cluster
from tests.distributed.harness import ROOT, run_launch
from tests.small_text import write_corpus

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

STEPS = 14
LIMIT_SECONDS = 120.0
"""For a launch with its starts of DeepSpeed, where nothing goes wrong."""
END_SECONDS = 60.0
"""For a launch to end where something has."""
SECRET = "hf_this-stays-private"


def flags(folder: Path, run: Path, *overrides: str) -> list[str]:
    """The model of preset quickstart under ZeRO-3, on a small text."""
    settings = [
        f"data={{sources: [{{kind: text, path: '{folder}/corpus'}}], validation_fraction: 0.1, "
        f"directory: '{folder}/tokens'}}",
        "tokenizer={kind: sentencepiece, vocab_size: 400}",
        f"training={{train_steps: {STEPS}, precision: fp32}}",
        "schedule={warmup_steps: 2}",
        "zero={stage: 3}",
        "checkpoint={interval: 4, keep_last: 2}",
        "evaluation={interval: 100, batches: 1}",
        "guards.step_0_checks=false",
        *overrides,
    ]
    return ["quickstart", "--run-dir", str(run), *(word for each in settings for word in ("--set", each))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    write_corpus(folder / "corpus", documents=120, words=240)
    return folder


@pytest.fixture(scope="module")
def undisturbed(pair: Cluster, folder: Path) -> list[float]:
    """Losses of the run on two ranks of this machine."""
    run = folder / "undisturbed"
    run_launch(flags(folder, run), num_ranks=2, timeout_seconds=LIMIT_SECONDS)
    return losses(run)


@pytest.fixture
def hosts(pair: Cluster) -> Iterator[Cluster]:
    """The pair, on which nothing may be left behind."""
    yield pair
    with contextlib.suppress(AssertionError):
        # the agent of a host that was cut off hears nothing for so long before it ends
        wait_until(lambda: not pair.processes(), "nothing is left behind", agent.SILENT_SECONDS + 10)
    left = pair.processes()
    pair.end_processes()
    assert left == {}


@dataclass
class Launch:
    """`dsllm launch` on host-a."""

    process: HostProcess
    screen: Path

    def wait(self, seconds: float) -> int:
        """Its exit status. Fails, with what is on screen, where it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds:g} s\n{self.text[-4000:]}")

    @property
    def text(self) -> str:
        return self.screen.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        return self.text.splitlines()[-1]


@contextlib.contextmanager
def launched(
    cluster: Cluster, folder: Path, run: Path, *options: str, env: dict[str, str] | None = None
) -> Iterator[Launch]:
    """The command runs within; it is killed at the end, if it still does."""
    hostfile = cluster.write_hostfile(folder / "hosts")
    command = [sys.executable, "-m", "dsllm.cli.app", "launch", *flags(folder, run), "--hostfile", str(hostfile)]
    screen = run.with_suffix(".screen")
    with screen.open("w") as out:
        process = cluster.hosts[0].popen([*command, *options], cwd=ROOT, stdout=out, stderr=out, env=env)
    try:
        yield Launch(process, screen)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(run: Path) -> list[float]:
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records(run)]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def wait_for_step(run: Path, step: int, launch: Launch) -> None:
    """Until the run has recorded it."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(records(run)) < step:
        if launch.process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"no step {step}\n{launch.text[-4000:]}")
        time.sleep(0.05)


@contextlib.contextmanager
def listening(host: Host, port: int) -> Iterator[None]:
    """Something else has the port."""
    process = host.popen([sys.executable, "-m", "http.server", str(port)], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: host.run(["ss", "-Htln", f"sport = :{port}"]).stdout, f"port {port} is taken")
        yield
    finally:
        process.kill()
        process.wait()


def ranks_on(host: Host) -> list[Process]:
    """Processes of train.py, without the launchers that name it."""
    return [each for each in host.processes() if "-u" in each.arguments[1:2] and "train.py" in each.arguments[2]]


def test_two_hosts_train_as_two_ranks_and_go_on_with_another_launcher(
    hosts: Cluster, folder: Path, undisturbed: list[float]
) -> None:
    run, (a, b) = folder / "two-hosts", hosts.hosts
    own_file = hosts.home / ".deepspeed_env"
    own_file.write_text("FROM_DEEPSPEED_ENV=also-private\n")
    ssh_files = {path: path.read_bytes() for path in (hosts.home / ".ssh").iterdir()}
    env = {"HF_TOKEN": SECRET, "NOT_FORWARDED": "1"}
    options = ["--launcher", "pdsh", "--master-port", "29500"]
    with listening(a, 29500), launched(hosts, folder, run, *options, env=env) as launch:
        wait_for_step(run, 5, launch)
        (rank,) = ranks_on(b)
        environment = b.run(["cat", f"/proc/{rank.pid}/environ"]).stdout.split("\0")
        command_lines = [" ".join(each.arguments) for host in hosts.hosts for each in host.processes()]
        launch.process.send_signal(signal.SIGTERM)
        assert launch.wait(END_SECONDS) == 0, launch.text
    done = len(records(run))
    assert 5 <= done < STEPS
    assert f"stopped by SIGTERM after step {done} of {STEPS}" in launch.text
    assert "--master_addr 10.77.0.1 --master_port " in launch.text
    assert "--master_port 29500 " not in launch.text
    assert f"HF_TOKEN={SECRET}" in environment
    assert "FROM_DEEPSPEED_ENV=also-private" in environment
    assert "DSLLM_WORLD_SIZE=2" in environment
    assert "GLOO_SOCKET_IFNAME=eth0" in environment
    assert not any(entry.startswith("NOT_FORWARDED") for entry in environment)
    told = ["\n".join(command_lines), launch.text, (run / "passport.json").read_text()]
    assert not any(secret in text for secret in (SECRET, "also-private") for text in told)
    assert own_file.read_text() == "FROM_DEEPSPEED_ENV=also-private\n"
    assert {path: path.read_bytes() for path in (hosts.home / ".ssh").iterdir()} == ssh_files

    with launched(hosts, folder, run, "--launcher", "ssh") as launch:
        assert launch.wait(LIMIT_SECONDS) == 0, launch.text
    assert f"going on from {run}/checkpoints/global_step{done}" in launch.text
    assert losses(run) == pytest.approx(undisturbed, abs=1e-4)
    assert [event["cause"] for event in events(run, "ended")] == ["stopped", "finished"]
    assert {path.name for path in (run / "logs").glob("*.log")} == {"rank0.log", "rank1.log"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["openmpi", "torchrun"])
def test_other_launchers_train_as_well(launcher: str, hosts: Cluster, folder: Path, undisturbed: list[float]) -> None:
    run = folder / launcher
    with launched(hosts, folder, run, "--launcher", launcher, env={"HF_TOKEN": SECRET}) as launch:
        wait_for_step(run, 2, launch)
        (rank,) = ranks_on(hosts.hosts[1])
        assert f"HF_TOKEN={SECRET}\0" in hosts.hosts[1].run(["cat", f"/proc/{rank.pid}/environ"]).stdout
        assert launch.wait(LIMIT_SECONDS) == 0, launch.text
    assert losses(run) == pytest.approx(undisturbed, abs=1e-4)
    assert SECRET not in launch.text


def test_a_host_that_is_cut_off_is_named_and_the_run_goes_on_with_the_other(
    hosts: Cluster, folder: Path, undisturbed: list[float]
) -> None:
    run, b = folder / "cut", hosts.hosts[1]
    with launched(hosts, folder, run, "--max-restarts", "1", "--min-hosts", "1") as launch:
        wait_for_step(run, 6, launch)
        with b.cut():
            wait_until(lambda: events(run, "ended"), "the launch notices", END_SECONDS)
            assert launch.wait(LIMIT_SECONDS) == 0, launch.text
            wait_until(lambda: not ranks_on(b), "the ranks of host-b end by themselves", END_SECONDS)
    (ended, finished) = events(run, "ended")
    assert (ended["cause"], ended["host"], finished["cause"]) == ("lost_host", "host-b", "finished")
    assert [event["hosts"] for event in events(run, "launched")] == [["host-a", "host-b"], ["host-a"]]
    assert "ended by lost_host: the way to host-b is gone: " in launch.text
    assert losses(run) == pytest.approx(undisturbed, abs=1e-3)


def test_a_rank_that_is_killed_on_the_other_host_ends_the_launch_with_its_host_and_cause(
    hosts: Cluster, folder: Path
) -> None:
    run, b = folder / "killed", hosts.hosts[1]
    with launched(hosts, folder, run) as launch:
        wait_for_step(run, 2, launch)
        b.kill(ranks_on(b)[0].pid)
        assert launch.wait(END_SECONDS) == 1, launch.text
    assert launch.text.splitlines()[-1].startswith(
        "dsllm: ended by lost_rank on host-b: SIGKILL ended a rank on host-b"
    )
    assert "rank 1 on host-b failed first; the end of " in launch.text


def test_ssh_that_dies_ends_the_launch_and_the_ranks_behind_it(hosts: Cluster, folder: Path) -> None:
    run, b = folder / "ssh-died", hosts.hosts[1]
    with launched(hosts, folder, run) as launch:
        wait_for_step(run, 2, launch)
        with b.refuse_ssh(end_sessions=True):
            assert launch.wait(END_SECONDS) == 1, launch.text
            wait_until(lambda: not ranks_on(b), "the ranks of host-b end by themselves", END_SECONDS)
    assert launch.last_line.startswith("dsllm: ended by lost_host on host-b: the way to host-b is gone: ")


def test_a_launch_that_is_killed_leaves_no_rank_on_any_host(hosts: Cluster, folder: Path) -> None:
    run = folder / "launch-killed"
    with launched(hosts, folder, run) as launch:
        wait_for_step(run, 2, launch)
        launch.process.send_signal(signal.SIGKILL)
        launch.process.wait()
    wait_until(lambda: not hosts.processes(), "every host ends its ranks", END_SECONDS)
