"""The hosts that the other tests of this folder rely on are like real ones, and every fault is one that a run meets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import namespaces
from tests.cluster.host import Host
from tests.cluster.isolation import wait_until

SERVE = """
import socket, sys
listener = socket.create_server((sys.argv[1], 7000))
print("listens", flush=True)
while True:
    connection, _ = listener.accept()
    while connection.recv(1 << 16):
        pass
    connection.close()
"""
SEND = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7000), timeout=2)
begin = time.monotonic()
connection.sendall(bytes(int(sys.argv[2])))
connection.shutdown(socket.SHUT_WR)
connection.settimeout(20)
connection.recv(1)
print(time.monotonic() - begin)
"""


def ssh(host: Host, to: str, command: str) -> subprocess.CompletedProcess[str]:
    return host.run(["ssh", "-o", "ConnectTimeout=1", to, command])


def reaches(host: Host, other: Host) -> bool:
    return host.run(["timeout", "1", "bash", "-c", f"> /dev/tcp/{other.name}/22"]).returncode == 0


@pytest.fixture
def listener(b: Host) -> Iterator[None]:
    process = b.popen([sys.executable, "-c", SERVE, b.address], stdout=subprocess.PIPE)
    assert next_line(process) == "listens"
    yield
    process.kill()
    process.communicate()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def send_seconds(host: Host, to: Host, num_bytes: int) -> float:
    """How long the bytes take to port 7000; infinity where no connection comes about within 2 s."""
    result = host.run([sys.executable, "-c", SEND, to.address, str(num_bytes)])
    return float(result.stdout) if result.returncode == 0 else float("inf")


def test_hosts_have_their_own_names_and_addresses_and_know_each_other(a: Host, b: Host) -> None:
    assert a.run(["hostname"]).stdout == "host-a\n"
    assert b.run(["hostname", "-I"]).stdout.split() == [b.address]
    assert a.run(["getent", "hosts", "host-b"]).stdout.split() == [b.address, "host-b"]
    assert a.run(["getent", "ahostsv4", "host-a"]).stdout.split()[0] == a.address


def test_ssh_reaches_the_other_host_and_itself_by_name_without_a_question(a: Host) -> None:
    assert ssh(a, "host-b", "hostname").stdout == "host-b\n"
    assert ssh(a, "host-a", "hostname").stdout == "host-a\n"


def test_pdsh_runs_a_command_on_every_host(a: Host) -> None:
    result = a.run(["pdsh", "-S", "-w", "host-a,host-b", "hostname"], env={"PDSH_RCMD_TYPE": "ssh"})
    assert sorted(result.stdout.splitlines()) == ["host-a: host-a", "host-b: host-b"]


def test_thirty_sessions_at_once_are_accepted(a: Host) -> None:
    script = "for each in $(seq 30); do ssh host-b true || echo refused & done; wait"
    assert a.run(["sh", "-c", script]).stdout == ""


def test_home_is_the_clusters_own(a: Host, pair: namespaces.Cluster) -> None:
    assert ssh(a, "host-b", "echo $HOME; cd ~root; pwd").stdout.splitlines() == [str(pair.home)] * 2
    assert a.run(["pwd"], env={"NAME": "value"}).stdout.strip() == str(pair.home)
    assert pair.home != Path.home()


def test_the_tests_own_environment_reaches_no_host(a: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert "secret" not in a.run(["env"]).stdout + ssh(a, "host-b", "env").stdout


def test_tmp_path_and_the_repository_are_shared_but_tmp_is_not(a: Host, b: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("shared")
    assert b.run(["cat", tmp_path / "file"]).stdout == "shared"
    assert b.run([sys.executable, "-c", "import dsllm"], cwd=namespaces.ROOT).returncode == 0
    for folder in ("/tmp", "/dev/shm", "/run"):
        assert a.run(["touch", f"{folder}/of-a"]).returncode == 0
        assert not Path(folder, "of-a").exists()
        assert b.run(["test", "-e", f"{folder}/of-a"]).returncode == 1


def test_a_repository_below_tmp_stays_in_sight(tmp_path: Path) -> None:
    """These two are, wherever TMPDIR puts pytest's own folder; the second is not shared."""
    places = [Path(subprocess.check_output(["mktemp", "-d", "-p", "/tmp"], text=True).strip()) for _ in range(2)]
    try:
        with namespaces.cluster(1, tmp_path, [places[0]]) as alone:
            found = [alone.hosts[0].run(["test", "-d", place]).returncode == 0 for place in places]
    finally:
        for place in places:
            place.rmdir()
    assert found == [True, False]


def test_two_clusters_with_the_same_addresses_do_not_meet(a: Host, b: Host, tmp_path: Path) -> None:
    with namespaces.cluster(2, tmp_path) as other, other.hosts[1].cut():
        assert other.hosts[1].address == b.address
        assert reaches(a, b)


def test_a_process_is_seen_on_its_own_host_alone_and_can_be_stopped_and_killed(
    a: Host, b: Host, pair: namespaces.Cluster
) -> None:
    process = b.popen(["sleep", "987"])
    wait_until(lambda: b.processes() and b.processes()[0].arguments == ("sleep", "987"), "sleep starts")
    (seen,) = b.processes()
    assert pair.processes() == {"host-b": [seen]}
    every_command = ["sh", "-c", "cat /proc/[0-9]*/cmdline"]
    assert "987" in b.run(every_command).stdout
    assert "987" not in a.run(every_command).stdout
    with b.stop(seen.pid):
        state = ["cut", "-d ", "-f3", f"/proc/{seen.pid}/stat"]
        wait_until(lambda: b.run(state).stdout == "T\n", "sleep is stopped")
    b.kill(seen.pid)
    assert process.wait(5) == -signal.SIGKILL
    assert pair.processes() == {}


def test_a_signal_reaches_the_command_and_its_exit_status_comes_back(b: Host, pair: namespaces.Cluster) -> None:
    process = b.popen(
        ["sh", "-c", "trap 'exit 7' INT; echo ready; while :; do sleep 0.05; done"], stdout=subprocess.PIPE
    )
    assert next_line(process) == "ready"
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 7
    process.communicate()
    wait_until(lambda: not pair.processes(), "the last sleep ends")


def test_a_command_that_takes_too_long_is_killed(b: Host, pair: namespaces.Cluster) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        b.run(["sleep", "987"], timeout_seconds=0.3)
    assert pair.processes() == {}


def test_what_is_left_on_hosts_can_be_ended(a: Host, pair: namespaces.Cluster) -> None:
    ssh(a, "host-b", "nohup sleep 987 >/dev/null 2>&1 &")
    assert [each.arguments for each in pair.processes()["host-b"]] == [("sleep", "987")]
    pair.end_processes()
    assert pair.processes() == {}


def test_a_host_that_is_cut_off_is_reached_again_when_mended(a: Host, b: Host) -> None:
    with b.cut():
        assert not reaches(a, b)
        assert not reaches(b, a)
        assert ssh(a, "host-b", "true").returncode == 255
        assert b.run(["hostname", "-I"]).stdout.split() == [b.address]
    wait_until(lambda: reaches(a, b), "host-a looks for host-b again")


def test_a_blocked_port_is_silent_and_others_are_open(a: Host, b: Host, listener: None) -> None:
    with b.block_port(7000):
        assert send_seconds(a, b, 1) == float("inf")
        assert ssh(a, "host-b", "true").returncode == 0
    assert send_seconds(a, b, 1) < 1


def test_a_host_may_hear_nothing_of_another(a: Host, b: Host) -> None:
    with b.block_from(a):
        assert not reaches(a, b)
    assert reaches(a, b)


def test_a_narrow_link_takes_as_long_as_its_rate_says(a: Host, b: Host, listener: None) -> None:
    """1 MB at 4 Mbit/s takes two seconds."""
    assert send_seconds(a, b, 1_000_000) < 1
    with b.slow(megabits_per_second=4):
        assert 1.5 < send_seconds(a, b, 1_000_000) < 6
    assert send_seconds(a, b, 1_000_000) < 1


def test_a_long_link_delays_both_ways(a: Host, b: Host) -> None:
    with b.slow(delay_ms=50):
        begin = time.monotonic()
        assert reaches(a, b)
        assert time.monotonic() - begin > 0.1


def test_ssh_can_be_refused_and_its_sessions_ended(a: Host, b: Host) -> None:
    process = a.popen(["ssh", "host-b", "echo ready; sleep 987"], stdout=subprocess.PIPE)
    assert next_line(process) == "ready"
    with b.refuse_ssh():
        assert "Connection refused" in ssh(a, "host-b", "true").stderr
        assert process.poll() is None
    with b.refuse_ssh(end_sessions=True):
        assert process.wait(5) == 255
        process.communicate()
        assert b.processes()  # what the session had started is an orphan now
    b.kill(b.processes()[-1].pid)
    assert ssh(a, "host-b", "true").returncode == 0


def test_a_hidden_folder_is_empty_there_and_as_before_afterwards(a: Host, b: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("shared")
    with b.hide(tmp_path):
        assert b.run(["ls", tmp_path]).stdout == ""
        assert ssh(a, "host-b", f"ls {tmp_path}").stdout == ""
        b.run(["touch", tmp_path / "of-b"])
        assert a.run(["ls", tmp_path]).stdout == "file\n"
    assert b.run(["ls", tmp_path]).stdout == "file\n"


def test_a_small_disk_is_full_soon(b: Host, tmp_path: Path) -> None:
    with b.small_disk(tmp_path, 65_536):
        assert "No space left" in b.run(["dd", "if=/dev/zero", f"of={tmp_path}/file", "bs=1M", "count=1"]).stderr
        assert b.run(["stat", "-c", "%s", tmp_path / "file"]).stdout == "65536\n"


def test_another_file_or_folder_can_lie_over_one(a: Host, b: Host, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with b.overlay(tmp_path / "one", tmp_path / "two"):
        assert b.run(["cat", tmp_path / "one" / "file"]).stdout == "two"
        assert a.run(["cat", tmp_path / "one" / "file"]).stdout == "one"
    with b.overlay(tmp_path / "one" / "file", tmp_path / "two" / "file"):
        assert b.run(["cat", tmp_path / "one" / "file"]).stdout == "two"


def test_sessions_can_be_given_variables(a: Host, b: Host) -> None:
    with b.set_environment(NAME="two words", OMP_NUM_THREADS="3"):
        assert ssh(a, "host-b", 'echo "$NAME $OMP_NUM_THREADS"').stdout == "two words 3\n"
    assert ssh(a, "host-b", 'echo "$NAME $OMP_NUM_THREADS"').stdout == " 1\n"


def interrupted_cluster(folder: Path, outer_pids: list[int]) -> None:
    with namespaces.cluster(1, folder) as alone:
        (host,) = alone.hosts
        host.popen(["sleep", "987"])
        wait_until(host.processes, "sleep starts")
        host.kill(host.processes()[0].pid, signal.SIGSTOP)
        outer_pids += [host.isolation.outer_pid, *(each.outer_pid for each in host.isolation.processes())]
        raise KeyboardInterrupt


def test_nothing_is_left_of_a_cluster_that_is_interrupted(tmp_path: Path) -> None:
    outer_pids: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted_cluster(tmp_path, outer_pids)
    assert len(outer_pids) == 3  # the first process, sleep and sshd
    assert not any(Path(f"/proc/{pid}").exists() for pid in outer_pids)


def test_nothing_is_left_where_even_the_tests_are_killed(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from tests.cluster import namespaces\n"
        "with namespaces.cluster(1, pathlib.Path(sys.argv[1])) as alone:\n"
        "    print(alone.hosts[0].isolation.outer_pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=namespaces.ROOT) as process:
        first_process = Path("/proc") / next_line(process)
        assert first_process.exists()
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not first_process.exists(), "the host ends")
