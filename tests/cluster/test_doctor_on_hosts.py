"""`dsllm doctor` on real hosts: it finds what is wrong, names the host, and says what to do."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import namespaces
from tests.cluster.namespaces import ROOT

PYTHONS = Path("~/.pyenv/versions").expanduser().glob("3.*/bin/python3.*[0-9]")
SHIFTED_CLOCK = "import time\nreal = time.time\ntime.time = lambda: real() - 300\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder that is there already, so that a fault can be mounted over it."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def examine(pair: namespaces.Cluster, tmp_path: Path, run_dir: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`dsllm doctor` as it is started on host-a, on both hosts; its folders are those of the test."""

    def run(
        *arguments: str | Path,
        spec: str | Path = "quickstart",
        slots: int = 1,
        quick: bool = True,
        cwd: Path = ROOT,
        path: str = str(ROOT),
    ):
        hostfile = pair.write_hostfile(tmp_path / "hosts", slots)
        return pair.hosts[0].run(
            [
                *(sys.executable, "-m", "dsllm.cli.app", "doctor", spec, "--hostfile", hostfile, "--run-dir", run_dir),
                *("--set", f"data.directory={tmp_path / 'data'}", *(["--quick"] if quick else []), *arguments),
            ],
            cwd=cwd,
            env={"PYTHONPATH": path},
            timeout_seconds=100,
        )

    return run


def finding(result: subprocess.CompletedProcess[str], check: str, host: str = "host-b") -> str:
    """What was found of that host by a check that failed, and what to do; fails where nothing else is to be done."""
    assert result.returncode == 1, result.stdout + result.stderr
    found = re.search(rf"^{host}: {check} failed: (.+\n    -> .+)$", result.stdout, re.MULTILINE)
    assert found, result.stdout + result.stderr
    assert re.search(rf"^{host}: not ready", result.stdout, re.MULTILINE), result.stdout
    return found[1]


def failed_checks(result: subprocess.CompletedProcess[str]) -> set[tuple[str, str]]:
    """Host and check of all that failed, by what --json prints."""
    findings = json.loads(result.stdout)["findings"]
    return {(one["host"], one["check"]) for one in findings if one["outcome"] == "failed"}


def test_a_healthy_pair_is_ready_with_its_links_measured(examine, pair):
    result = examine(quick=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for host in pair.hosts:
        assert re.search(rf"^ *{host.name}( +ok){{4}} +warned( +ok){{3}} *$", result.stdout, re.MULTILINE), (
            result.stdout
        )
    assert f"ranks meet at {pair.hosts[0].address}, port 29500" in result.stdout
    assert re.search(
        r"^all-reduce \(gloo\): \S+ \wB/s bus bandwidth, \S+ ms; worst of the pairs: host-a - host-b: ",
        result.stdout,
        re.MULTILINE,
    )
    seconds = re.search(r"^2 hosts, ready \((.+) s\)$", result.stdout, re.MULTILINE)
    assert seconds, result.stdout
    print(f"a healthy pair took {seconds[1]} s")
    assert not pair.processes()


def test_the_report_is_json_too_and_nothing_is_left_behind(examine, pair, tmp_path, run_dir):
    run_dir.rmdir()
    document = json.loads(examine("--json").stdout)
    assert document["ready"]
    assert document["rendezvous"] == {
        "address": pair.hosts[0].address,
        "port": 29500,
        "interfaces": {"host-a": "eth0", "host-b": "eth0"},
        "own_addresses": {host.name: host.address for host in pair.hosts},
    }
    assert document["hosts"]["host-b"]["host_name"] == "host-b"
    assert document["links"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["hosts"]
    assert not pair.processes()


def test_a_host_that_is_down_is_named(examine, b):
    with b.cut():
        words = finding(examine(), "reach")
    assert re.match(
        r"ssh: connect to host host-b port 22: (No route to host|Connection timed out)\n"
        r"    -> see that it is up, in this network, and lets ssh in \(firewall\), or leave it out: --exclude host-b$",
        words,
    )


def test_refused_ssh_is_named(examine, b):
    with b.refuse_ssh():
        assert finding(examine(), "reach") == (
            "ssh: connect to host host-b port 22: Connection refused\n"
            "    -> start sshd there, or correct its port in ~/.ssh/config"
        )


def test_a_host_without_the_folder_is_named(examine, b, tmp_path):
    (tmp_path / "place" / "here").mkdir(parents=True)
    with b.hide(tmp_path / "place"):
        words = finding(examine(cwd=tmp_path / "place" / "here"), "reach")
    assert words.endswith(f"make {tmp_path}/place/here there too, shared or copied; ranks start in it")


def test_a_host_without_the_python_is_named(examine, b):
    with b.hide(Path(sys.executable).parent):
        words = finding(examine(), "reach")
    assert words.endswith(f"install the same environment there; ranks are started with {sys.executable}")


def test_another_python_is_named_with_both_versions(examine, b):
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    minors = {int(path.name.removeprefix("python3.")): path for path in PYTHONS}
    others = [minors[minor] for minor in sorted(minors) if minor >= 8 and f"3.{minor}" != mine]
    if not others:
        pytest.skip("no other Python from 3.8 on here (pyenv install 3.12)")
    with b.overlay(sys.executable, others[0]):  # the oldest that still answers
        result = examine("--json")
        assert ("host-b", "python") in failed_checks(result)
        words = finding(examine(), "python")
    assert re.match(
        rf"Python 3\.\S+; host-a has {re.escape(mine)}\.\d+\n    -> install Python {mine}\.\d+ there", words
    )


def test_another_dsllm_is_named_though_its_version_is_the_same(examine, b, tmp_path):
    copy = shutil.copytree(ROOT / "dsllm", tmp_path / "dsllm", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "train.py").open("a") as file:
        file.write("# another line\n")
    with b.overlay(ROOT / "dsllm", copy):
        words = finding(examine(), "dsllm")
    assert re.match(
        r"dsllm 0\.\S+ \(\w{8}\); host-a has 0\.\S+ \(\w{8}\)\n"
        r"    -> copy the dsllm of host-a there, or start from a folder that is shared$",
        words,
    )


def test_another_spec_file_is_named(examine, b, tmp_path):
    mine, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    shutil.copy(ROOT / "dsllm/spec/presets/quickstart.yaml", mine)
    other.write_text(mine.read_text() + "# changed\n")
    with b.overlay(mine, other):
        assert "copy " in finding(examine(spec=mine), "spec")


def test_more_slots_than_cores_are_refused(examine):
    """Both hosts are this machine, with the same cores."""
    result = examine("--set", "batch.global_batch_size=1024", "--set", "batch.micro_batch_size=1", slots=512)
    words = finding(result, "GPUs", "host-a, host-b")
    assert re.match(r"no GPU; \d+ cores? for 512 slots\n    -> lower its slots to \d+ in the hostfile", words)


def test_a_clock_that_is_five_minutes_behind_is_named(examine, b, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (there / "sitecustomize.py").write_text(SHIFTED_CLOCK)
    with b.overlay(here, there), b.set_environment(PYTHONPATH=str(here)):
        words = finding(examine(path=f"{ROOT}:{here}"), "clock")
    assert re.match(r"its clock is (299|300) s behind host-a's\n    -> let NTP keep it there", words)


def test_a_launcher_whose_clock_is_five_minutes_behind_only_warns(examine, tmp_path):
    of_launcher = "".join(f"    {line}\n" for line in SHIFTED_CLOCK.splitlines())
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nif 'dsllm.cli.app' in sys.orig_argv:\n{of_launcher}")
    result = examine("--include", "host-b", path=f"{ROOT}:{tmp_path}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(
        r"^host-b: clock warned: this machine's clock is (299|300) s behind host-b's\n    -> let NTP keep it: ",
        result.stdout,
        re.MULTILINE,
    ), result.stdout


def test_a_run_folder_that_is_not_shared_is_named(examine, b, run_dir):
    with b.hide(run_dir):
        words = finding(examine(), "folder")
    assert words == (
        f"{run_dir} is not shared: what host-a writes is not seen there (tmpfs)\n"
        "    -> mount the folder of host-a there (NFS or the like), or give a shared one with --run-dir"
    )


def test_a_run_folder_that_the_launcher_does_not_see_is_named(examine, b, run_dir, tmp_path):
    assert examine("--include", "host-b").returncode == 0
    with b.hide(run_dir):
        words = finding(examine("--include", "host-b"), "history")
    assert words == (
        f"{run_dir} is not shared with this machine, where dsllm launch reads how far the run has come\n"
        "    -> start from one of the hosts, mount the folder here, or give a shared one with --run-dir"
    )
    assert list(run_dir.iterdir()) == []


def test_tokens_that_only_one_host_has_are_named(examine, b, tmp_path):
    (tmp_path / "data").mkdir()
    with b.hide(tmp_path / "data"):
        assert "prepares would not be seen there" in finding(examine(), "data")
        (tmp_path / "data" / "manifest.json").write_text("{}")
        assert "no tokens in" in finding(examine(), "data")


def test_a_disk_that_is_full_is_named_with_the_forecast(examine, b, run_dir):
    with b.small_disk(run_dir, 4096):
        result = examine()
    assert "cannot be written: No space left on device\n    -> make room there" in finding(result, "folder")
    assert re.match(
        rf"4.00 KiB free in {run_dir}; the run comes to need \S+ MiB, for 3 checkpoints of \S+ MiB\n"
        r"    -> make room there, or lower checkpoint.keep_last$",
        finding(result, "space"),
    )


def test_a_port_that_one_host_cannot_reach_is_named(examine, b):
    rule = "OUTPUT -p tcp --dport 29500 -j DROP"
    with b.block_port(9):  # skips where there is no iptables
        b.isolation.do(f"iptables -w -I {rule}")
        try:
            words = finding(examine(), "port")
        finally:
            b.isolation.do(f"iptables -w -D {rule}")
    assert words == (
        "cannot reach port 29500 of host-a: timed out\n"
        "    -> open all TCP ports between the hosts, as gloo and NCCL take any (firewall, security group)"
    )


def test_a_host_that_lets_nobody_in_but_ssh_is_named(examine, b):
    rule = "INPUT -p tcp --dport 1024:65535 --syn -j DROP"
    with b.block_port(9):  # skips where there is no iptables
        b.isolation.do(f"iptables -w -I {rule}")
        try:
            words = finding(examine(), "port")
        finally:
            b.isolation.do(f"iptables -w -D {rule}")
    assert re.match(r"host-a cannot reach it \(port \d+: timed out\)\n    -> open all TCP ports ", words)


def test_a_port_that_is_blocked_is_named(examine, a):
    with a.block_port(29500):
        words = finding(examine(), "port", "host-a")
    assert words.startswith("nobody reaches its port 29500, not even itself: timed out\n    -> open all TCP ports ")


def test_a_port_that_is_in_use_is_replaced_by_a_free_one(examine, a):
    with a.popen([sys.executable, "-c", "import socket; socket.create_server(('', 29500)).accept()"]) as process:
        a.run(["sh", "-c", "until ss -Htln 'sport = :29500' | grep -q .; do sleep 0.05; done"])
        document = json.loads(examine("--json").stdout)
        process.kill()
    assert document["ready"]
    assert document["rendezvous"]["port"] != 29500


def test_hosts_that_have_ipv6_alone_meet_and_are_measured(examine, pair, tmp_path):
    names = tmp_path / "names"
    names.write_text("127.0.0.1 localhost\nfd77::1 host-a\nfd77::2 host-b\n")
    with contextlib.ExitStack() as undone:
        for number, host in enumerate(pair.hosts, start=1):
            undone.enter_context(host.overlay("/etc/hosts", names))
            undone.callback(
                host.isolation.do,
                f"ip address add {host.address}/24 dev eth0; ip address del fd77::{number}/64 dev eth0",
            )
            host.isolation.do(
                f"ip address add fd77::{number}/64 dev eth0 nodad && ip address del {host.address}/24 dev eth0"
            )
        document = json.loads(examine("--json", quick=False).stdout)
    assert document["ready"], document["findings"]
    assert document["rendezvous"]["address"] == "fd77::1"
    assert document["rendezvous"]["interfaces"] == {"host-a": "eth0", "host-b": "eth0"}
    assert document["links"]["backend"] == "gloo"


def test_a_slow_link_is_named_with_its_figures(examine, b):
    with b.slow(megabits_per_second=80):
        result = examine(quick=False)
    assert result.returncode == 1, result.stdout + result.stderr
    found = re.search(
        r"^host-a, host-b: link failed: host-a - host-b: (\S+) MB/s, .*; less than 100.0 MB/s$",
        result.stdout,
        re.MULTILINE,
    )
    assert found, result.stdout + result.stderr
    assert float(found[1]) < 15
    assert "-> see the interface there (eth0) with ethtool" in result.stdout
