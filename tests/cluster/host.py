"""One host of a cluster, and what can go wrong with it. Each fault is a context manager that puts things back.

with b.cut():
    assert a.run(["ssh", "host-b", "true"]).returncode == 255
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from tests.cluster.isolation import (
    SEARCH_PATH,
    TOOLS_ALONE,
    HostProcess,
    Isolation,
    Process,
    lacks,
    send,
    tool,
    wait_until,
)

SSH_PORT = 22
CORES = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""In each session by ssh too: ranks of several hosts share the cores of one machine, and must not spin on them."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}

SSHD_CONFIG = """\
Port {port}
HostKey "{folder}/host_key"
PidFile none
StrictModes no
UsePAM no
UseDNS no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 500
AcceptEnv LANG LC_*
SetEnv {environment}
"""


@dataclass
class Host:
    """One host of a cluster."""

    name: str
    address: str
    folder: Path
    """Its configuration, and the log of its sshd."""
    home: Path
    """The home folder of root, the only user; all hosts of a cluster share it."""
    isolation: Isolation
    hub: Isolation
    """Where the other end of its cable is, an interface with the name of the host."""
    session_environment: dict[str, str] = field(default_factory=lambda: dict(CORES))
    """What its sshd sets in each session, and `run` and `popen` too."""
    _sshd: HostProcess | None = None

    def run(
        self,
        arguments: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        input_text: str | None = None,
        timeout_seconds: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command as a login on this host would, in the home folder unless `cwd` says otherwise.

        `env` is added to a small environment; nothing comes from that of the tests. Raises TimeoutExpired past
        `timeout_seconds`, when the command is killed, but not what it started.
        """
        return self.isolation.run(
            arguments,
            env=self._environment(env),
            cwd=cwd or self.home,
            input_text=input_text,
            timeout_seconds=timeout_seconds,
        )

    def popen(
        self,
        arguments: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: int | IO[str] = subprocess.DEVNULL,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
    ) -> HostProcess:
        """As `run`, without waiting. `send_signal`, `terminate` and `kill` reach the command itself."""
        return self.isolation.popen(
            arguments, env=self._environment(env), cwd=cwd or self.home, stdin=stdin, stdout=stdout, stderr=stderr
        )

    def _environment(self, added: Mapping[str, str] | None) -> dict[str, str]:
        login = {"HOME": str(self.home), "USER": "root", "LOGNAME": "root", "SHELL": "/bin/sh", "LANG": "C.UTF-8"}
        path = f"{Path(sys.executable).parent}:{SEARCH_PATH}"
        cpu = {"DS_ACCELERATOR": "cpu", **OFFLINE}
        return {**login, "PATH": path, **cpu, **self.session_environment, **(added or {})}

    def processes(self) -> list[Process]:
        """All processes of this host but its first one and those of sshd; sessions' shells are among them."""
        return [each for each in self.isolation.processes() if not _is_sshd(each)]

    def kill(self, pid: int, sig: int = signal.SIGKILL) -> None:
        """Signals the process that is `pid` on this host."""
        send(self._outer_pid(pid), sig)

    @contextlib.contextmanager
    def stop(self, pid: int) -> Iterator[None]:
        """The process `pid` of this host is there, and does nothing."""
        outer_pid = self._outer_pid(pid)
        send(outer_pid, signal.SIGSTOP)
        try:
            yield
        finally:
            send(outer_pid, signal.SIGCONT)

    def _outer_pid(self, pid: int) -> int:
        return next(each.outer_pid for each in self.isolation.processes() if each.pid == pid)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Its cable is pulled, at the far end: the host keeps its address, and nothing reaches or leaves it.

        Afterwards others that have looked for it in vain may take some seconds to look again, as with real hosts.
        """
        self.hub.do(f"ip link set {self.name} down")
        try:
            yield
        finally:
            self.plug_in()

    def plug_in(self) -> None:
        """Connects its cable, and returns when both ends have noticed, which can take the kernel a second."""
        self.hub.do(f"ip link set {self.name} up")
        switch = ["bridge", "link", "show", "dev", self.name]
        wait_until(lambda: "state forwarding" in self.hub.run(switch, env=TOOLS_ALONE).stdout, f"{self.name} is linked")
        own = ["cat", "/sys/class/net/eth0/operstate"]
        wait_until(lambda: self.run(own).stdout == "up\n", f"eth0 of {self.name} is up")

    def block_port(self, port: int) -> contextlib.AbstractContextManager[None]:
        """What comes for TCP port `port` is dropped. Skips the test where there is no iptables."""
        return self._dropped(f"-p tcp --dport {port}")

    def block_from(self, other: Host) -> contextlib.AbstractContextManager[None]:
        """All that comes from `other` is dropped, answers too. Skips the test where there is no iptables."""
        return self._dropped(f"-s {other.address}")

    def _dropped(self, what: str) -> contextlib.AbstractContextManager[None]:
        _require("iptables -w -I INPUT -p tcp --dport 9 -j DROP")
        rule = f"INPUT {what} -j DROP"
        return _between(self.isolation, f"iptables -w -I {rule}", f"iptables -w -D {rule}")

    @contextlib.contextmanager
    def slow(self, *, delay_ms: float = 0.0, megabits_per_second: float = 0.0) -> Iterator[None]:
        """Its cable is slow both ways: each packet takes `delay_ms` longer, or few fit, or both.

        Skips the test where the kernel cannot do what is asked for: `sch_netem` delays, `sch_tbf` limits.
        """
        rate = f"rate {megabits_per_second}mbit" if megabits_per_second else ""
        # tc-tbf: a bucket must hold what passes between two ticks of the kernel's clock, and the largest packet.
        bucket_bytes = max(16_384, int(megabits_per_second * 1e6 / 8 / 100))
        limit = f"tbf {rate} burst {bucket_bytes} latency 400ms"
        kind = f"netem delay {delay_ms}ms {rate}" if delay_ms else limit
        _require(f"ip link set lo up && tc qdisc add dev lo root {kind}")
        with contextlib.ExitStack() as both_ends:
            for place, interface in ((self.isolation, "eth0"), (self.hub, self.name)):
                qdisc = f"dev {interface} root"
                both_ends.enter_context(_between(place, f"tc qdisc add {qdisc} {kind}", f"tc qdisc del {qdisc}"))
            yield

    def hide(self, path: str | Path) -> contextlib.AbstractContextManager[None]:
        """On this host the folder `path` is empty, and what is written to it is seen by no other: it is not shared."""
        return self._mounted("-t tmpfs tmpfs", path)

    def small_disk(self, path: str | Path, size_bytes: int) -> contextlib.AbstractContextManager[None]:
        """On this host the folder `path` is an empty disk of `size_bytes`, in whole pages."""
        return self._mounted(f"-t tmpfs -o size={size_bytes} tmpfs", path)

    def overlay(self, path: str | Path, source: str | Path) -> contextlib.AbstractContextManager[None]:
        """On this host `source` is what is found at `path`: a file at a file, a folder at a folder."""
        return self._mounted(f"--bind {shlex.quote(str(source))}", path)

    def _mounted(self, what: str, path: str | Path) -> contextlib.AbstractContextManager[None]:
        target = shlex.quote(str(Path(path).resolve()))
        # Lazily, because a process of a test may still have files open there.
        return _between(self.isolation, f"mount {what} {target}", f"umount -l {target}")

    @contextlib.contextmanager
    def refuse_ssh(self, *, end_sessions: bool = False) -> Iterator[None]:
        """No sshd listens; sessions that are open go on, unless they are to end too."""
        self.stop_sshd()
        if end_sessions:
            for each in filter(_is_sshd, self.isolation.processes()):
                send(each.outer_pid, signal.SIGKILL)
        try:
            yield
        finally:
            self.start_sshd()

    @contextlib.contextmanager
    def set_environment(self, **variables: str) -> Iterator[None]:
        """Variables that each new session on this host has; an empty one is set, and empty."""
        before = dict(self.session_environment)
        self.session_environment.update(variables)
        self._restart_sshd()
        try:
            yield
        finally:
            self.session_environment = before
            self._restart_sshd()

    def _restart_sshd(self) -> None:
        self.stop_sshd()
        self.start_sshd()

    def stop_sshd(self) -> None:
        """Ends the sshd that listens; sessions that are open go on."""
        if self._sshd is not None:
            self._sshd.terminate()
            self._sshd.wait()

    def start_sshd(self) -> None:
        """Starts its sshd, and returns when it listens."""
        environment = " ".join(f'"{name}={value}"' for name, value in self.session_environment.items())
        config = self.folder / "sshd_config"
        config.write_text(SSHD_CONFIG.format(port=SSH_PORT, folder=self.folder, environment=environment))
        with (self.folder / "sshd.log").open("a") as log:
            self._sshd = self.isolation.popen([tool("sshd"), "-D", "-e", "-f", config], env=TOOLS_ALONE, stderr=log)
        listeners = ["ss", "-Htln", f"sport = :{SSH_PORT}"]  # a connection to try it would take one of its sessions
        wait_until(lambda: self.run(listeners).stdout, f"sshd of {self.name} listens; {self.folder}/sshd.log says why")


@contextlib.contextmanager
def _between(place: Isolation, before: str, after: str) -> Iterator[None]:
    place.do(before)
    try:
        yield
    finally:
        place.do(after)


def _require(script: str) -> None:
    if reason := lacks(script):
        pytest.skip(reason)


def _is_sshd(process: Process) -> bool:
    return Path(process.arguments[0].split(":")[0]).name in ("sshd", "sshd-session")
