"""A part of this machine that is apart from the rest: network, mounts, host name, shared memory and process numbers.

Nothing of it has a name outside: no interface, no address and no `ip netns` entry that two test processes could clash
over. It lasts as long as its first process, which ends when the pipe from this process closes, however that comes
about; the kernel then kills every process inside and takes mounts and interfaces away.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

TOOLS = ("unshare", "nsenter", "setsid", "env", "mount", "ip", "sshd", "ssh", "ssh-keygen", "pdsh")
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TOOLS_ALONE = {"PATH": SEARCH_PATH}
SPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
UNSHARE = (*SPACES, "--fork", "--mount-proc")
PATIENCE_SECONDS = 20.0
# Ignoring SIGCHLD lets the kernel reap what is orphaned; a first process that does not would collect zombies.
FIRST_PROCESS = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("up", flush=True)
sys.stdin.read()
"""


class HostProcess(subprocess.Popen[str]):
    """A process in a host. This machine's own child is the `nsenter` that went in; signals go to what it started."""

    def send_signal(self, sig: int) -> None:
        inside = _children(self.pid)
        if self.poll() is None and inside:
            send(inside[0], sig)

    def wake(self) -> None:
        """Lets both go on where they are stopped."""
        super().send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class Process:
    """A process as its host sees it."""

    pid: int
    arguments: tuple[str, ...]
    outer_pid: int = field(repr=False)
    """Its number outside."""


@dataclass(frozen=True)
class Isolation:
    """What `isolated` makes: a place to run commands in."""

    outer_pid: int
    """Of the first process, in this process's numbers."""
    started: list[HostProcess] = field(default_factory=list, repr=False)

    def popen(
        self,
        arguments: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        cwd: str | Path = "/",
        stdin: int | IO[str] = subprocess.DEVNULL,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
    ) -> HostProcess:
        """Starts `arguments` inside, as the leader of a session of its own, with `env` for its whole environment."""
        enter = [tool("nsenter"), "--target", str(self.outer_pid), *SPACES]
        inside = [
            "/bin/sh",
            "-c",
            'cd "$1" && shift && exec "$@"',
            "sh",
            str(cwd),
            tool("setsid"),
            *(tool("env"), "--default-signal"),  # a shell that runs the tests in the background has SIGINT ignored
            *map(str, arguments),
        ]
        process = HostProcess(
            [*enter, "--", *inside],
            env=dict(env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        self.started[:] = [each for each in self.started if each.returncode is None] + [process]
        wait_until(lambda: _children(process.pid) or process.poll() is not None, f"{arguments[0]} starts")
        return process

    def run(
        self,
        arguments: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        cwd: str | Path = "/",
        input_text: str | None = None,
        timeout_seconds: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Runs `arguments` inside to their end.

        Raises TimeoutExpired past `timeout_seconds`, when the process is killed, but not those that it started.
        """
        pipe = subprocess.PIPE
        stdin = subprocess.DEVNULL if input_text is None else pipe
        with self.popen(arguments, env=env, cwd=cwd, stdin=stdin, stdout=pipe, stderr=pipe) as process:
            try:
                output, errors = process.communicate(input_text, timeout=timeout_seconds)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(list(arguments), process.returncode, output, errors)

    def do(self, script: str) -> None:
        """Runs a shell script of the tests' own inside; raises AssertionError with what it said where it fails."""
        result = self.run(["/bin/sh", "-ec", script], env=TOOLS_ALONE)
        assert result.returncode == 0, f"{script}\nexits {result.returncode}: {result.stderr.strip()}"

    def processes(self) -> list[Process]:
        """All that run inside but the first one; those that ended and wait to be noticed are left out."""
        mine = os.readlink(f"/proc/{self.outer_pid}/ns/pid")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ends meanwhile
                if os.readlink(folder / "ns/pid") == mine:
                    outer_pid = int(folder.name)
                    words = (folder / "cmdline").read_text().split("\0")
                    found.append(Process(int(_status(outer_pid, "NSpid")), tuple(words[:-1]), outer_pid))
        return sorted((each for each in found if each.pid != 1 and each.arguments), key=lambda each: each.pid)


@contextlib.contextmanager
def isolated() -> Iterator[Isolation]:
    """A fresh isolation; all that runs in it is killed at the end."""
    command = [tool("unshare"), *UNSHARE, "--", sys.executable, "-ISc", FIRST_PROCESS]
    pipe, started = subprocess.PIPE, list[HostProcess]()
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n", f"{shlex.join(command)} does not start"
            made = Isolation(_children(process.pid)[0])
            started = made.started
            yield made
        finally:
            # The first process cannot end before each `nsenter` has taken note, which one that is stopped does not.
            for each in started:
                each.wake()
            assert process.stdin is not None
            process.stdin.close()
            process.wait(PATIENCE_SECONDS)
            for each in started:
                each.wait(PATIENCE_SECONDS)


def connect(place: Isolation, interface: str, other: Isolation, other_interface: str) -> None:
    """A cable between the two: an interface in each."""
    # Of the isolation only the network is entered: `ip` is to know the other by its process number out here.
    enter = [tool("nsenter"), "--target", str(place.outer_pid), "--net", tool("ip"), "link", "add", interface]
    other_end = ["type", "veth", "peer", "name", other_interface, "netns", str(other.outer_pid)]
    subprocess.run([*enter, *other_end], check=True)


@functools.cache
def why_not() -> str | None:
    """Why there can be no hosts on this machine, found by trying; None where there can."""
    if os.geteuid() != 0:
        return "hosts on one machine need root, for namespaces and an sshd in each"
    missing = [name for name in TOOLS if shutil.which(name, path=SEARCH_PATH) is None]
    if missing:
        return f"hosts on one machine need {', '.join(missing)}: apt-get install iproute2 openssh-server pdsh"
    return lacks(
        "ip link add switch type bridge && ip link add left type veth peer name right && mount -t sysfs sysfs /sys"
        " && mount -t tmpfs tmpfs /tmp && mount --bind /etc/passwd /etc/hosts"
    )


@functools.cache
def lacks(script: str) -> str | None:
    """What `script` says on stderr where it fails in an isolation of its own; None where it succeeds."""
    command = [tool("unshare"), *UNSHARE, "--", "/bin/sh", "-ec", script]
    result = subprocess.run(command, env=TOOLS_ALONE, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return f"{script}: {result.stderr.strip()}" if result.returncode else None


def tool(name: str) -> str:
    """Its path, so that a test may start commands with any PATH."""
    return shutil.which(name, path=SEARCH_PATH) or name


def send(outer_pid: int, sig: int) -> None:
    """Signals a process that may have ended.

    `nsenter` stops itself when what it started is stopped, and has to be woken to see how that went on.
    """
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        parent = Path("/proc") / _status(outer_pid, "PPid")
        os.kill(outer_pid, sig)
        if sig in (signal.SIGCONT, signal.SIGKILL) and (parent / "comm").read_text() == "nsenter\n":
            os.kill(int(parent.name), signal.SIGCONT)


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Looks again and again; raises AssertionError where `condition` has not come about in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)


def _children(outer_pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{outer_pid}/task/{outer_pid}/children").read_text().split()]
    except OSError:
        return []


def _status(outer_pid: int, name: str) -> str:
    """The last word of a line of /proc/PID/status; of NSpid, that is the number in the innermost namespace."""
    lines = Path(f"/proc/{outer_pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}:")).split()[-1]
