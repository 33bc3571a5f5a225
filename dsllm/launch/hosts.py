"""The hosts of a launch, each with an agent of ours on it that answers (see `agent.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import Any

from dsllm.errors import DsllmError, UserError

SSH_FAILED = 255
"""ssh's own exit status, whatever became of the command on the host."""
PING_SECONDS = 5.0
ANSWER_SECONDS = 15.0
"""For what an agent does at once."""
FIRST_ANSWER_SECONDS = 60.0
"""The way to a host, and Python from a file system that many hosts read at once."""
SILENT_SECONDS = 15.0
"""Without an answer to a ping: the host may be gone, or the way to it slow."""
LOST_SECONDS = 45.0
"""Without an answer: it is gone."""
SSH_OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    # ends what leads to a host that is cut off, which is known as lost by then, not at the end of TCP's patience
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
)
SOURCE = Path(__file__).with_name("agent.py")
BOOTSTRAP = (
    'import os, sys; sys.path[:] = filter(None, sys.path); s = b""; '
    'exec("while len(s) < {size}: s += os.read(0, {size} - len(s))"); exec(compile(s, "agent", "exec"))'
)
"""Reads the agent from its input, not by sys.stdin, which would read ahead; no file of the run's folder is a module to
it. One line without single quotes, backslashes and exclamation marks: every shell takes it as it is."""
Way = Callable[[str, str], list[str]]
"""From a host and a line of shell to the command of this machine that runs it there."""


class HostError(DsllmError):
    """A host that cannot be asked, or whose answer is an error; `words` are those of ssh, the shell or the system."""

    def __init__(self, host: str, words: str, status: int | None = None) -> None:
        """`status` is that of the way to the host where it has ended: 255 means ssh's own."""
        super().__init__(f"{host}: {words}")
        self.host = host
        self.words = words
        self.status = status


def over_ssh(host: str, line: str) -> list[str]:
    """The way to another machine, as the user's ssh configuration has it."""
    return ["ssh", *SSH_OPTIONS, host, line]


def on_this_machine(host: str, line: str) -> list[str]:
    """The way to the machine that the launcher runs on."""
    return ["sh", "-c", line]


def shell_line(folder: Path, command: Sequence[str]) -> str:
    """What a shell on a host is to do: `command` in `folder`, with this process's PYTHONPATH, where packages may be."""
    path = os.environ.get("PYTHONPATH")
    words = ["env", f"PYTHONPATH={path}", *command] if path else command
    return f"cd {shlex.quote(str(folder))} && exec {shlex.join(words)}"


class Agent:
    """The agent on one host, from this side."""

    def __init__(self, host: str, way: Way, folder: Path, python: str) -> None:
        """Start it, in `folder`, under the interpreter that the ranks will have. Its first answer tells whether it is
        there.

        Raises UserError where the program is missing that leads to the host.
        """
        self.host = host
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the agent
        source = SOURCE.read_bytes()
        command = way(host, shell_line(folder, [python, "-u", "-c", BOOTSTRAP.format(size=len(source))]))
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # a Ctrl-C is the launcher's to answer
            )
        except FileNotFoundError:
            raise UserError(
                f"{command[0]}: not installed here; hosts are asked with it: install it, or choose another --launcher"
            ) from None
        self._writing = threading.Lock()
        self._asked: dict[int, Queue[dict[str, Any] | None]] = {}
        self._number = 0
        self._unanswered_pings = 0
        self._has_answered = False
        self._has_ended = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        self._write(source)

    @property
    def is_lost(self) -> bool:
        """Whether the way to the host, or the agent, has ended."""
        return self._has_ended.is_set()

    @property
    def silent_seconds(self) -> float:
        """Without an answer to a ping; counted in pings, not by the clock, so that a launch that was suspended goes on
        as if nothing had been."""
        return PING_SECONDS * max(0, self._unanswered_pings - 1)

    def ask(self, do: str, seconds: float = ANSWER_SECONDS, **arguments: Any) -> Any:
        """What the agent's function `do` returns there. Raises HostError after `seconds`, or after a minute before
        its first answer."""
        if not self._has_answered:
            seconds = max(seconds, FIRST_ANSWER_SECONDS)
        answers: Queue[dict[str, Any] | None] = Queue()
        with self._writing:
            self._number += 1
            number = self._number
        self._asked[number] = answers
        self._write(json.dumps({"id": number, "do": do, **arguments}).encode() + b"\n")
        if self.is_lost:
            answers.put(None)
        try:
            answer = answers.get(timeout=seconds)
        except Empty:
            raise HostError(self.host, f"no answer within {seconds:g} s") from None
        finally:
            del self._asked[number]
        if answer is None:
            raise self.why_lost()
        if "error" in answer:
            raise HostError(self.host, answer["error"])
        return answer["result"]

    def why_lost(self) -> HostError:
        """Of an agent that is lost, the last that ssh or the shell said; of another one, that it is silent."""
        if not self.is_lost:
            return HostError(self.host, f"no answer for {self.silent_seconds:.0f} s")
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        silent = "ssh lost the connection" if status == SSH_FAILED else f"ended with status {status}"
        return HostError(self.host, lines[-1].strip().rstrip(".") if lines else silent, status)

    def note(self) -> None:
        """Let it know that the launcher is there, and ask whether it is."""
        self._unanswered_pings += 1
        self._write(b'{"id": 0, "do": "ping"}\n')

    def close(self) -> None:
        """Hang up: the agent ends what it guards, and itself."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def wait(self, seconds: float) -> None:
        """Until it has ended, after `seconds` by force."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    def _write(self, data: bytes) -> None:
        with self._writing, contextlib.suppress(OSError, ValueError):  # the reader learns that it has ended
            self._stdin.write(data)
            self._stdin.flush()

    def _read(self) -> None:
        """A thread's work: hand each answer to who waits for it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a login script may print
                answer = json.loads(line)
                self._unanswered_pings, self._has_answered = 0, True
                self._asked[answer["id"]].put(answer)
        self._process.wait()
        self._has_ended.set()
        for answers in list(self._asked.values()):
            answers.put(None)


class Hosts:
    """Agents on all hosts of a launch, asked at once. A context: at its end they are gone."""

    def __init__(
        self, names: Sequence[str], way: Way, folder: Path | None = None, python: str = sys.executable
    ) -> None:
        """Starts them; the first answers tell which are there. `folder` is this one when absent."""
        _allow_open_files()
        self.agents = {name: Agent(name, way, folder or Path.cwd(), python) for name in names}
        self._closed = threading.Event()
        threading.Thread(target=self._ping, daemon=True).start()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask_all(
        self,
        do: str,
        seconds: float = ANSWER_SECONDS,
        each: Mapping[str, Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> dict[str, Any | HostError]:
        """The answer of every host, or why there is none, by name. `each` adds arguments by host, and leaves out the
        hosts that it does not name."""
        names = list(self.agents if each is None else each)
        answers: dict[str, Any | HostError] = {}

        def ask(name: str) -> None:
            try:
                answers[name] = self.agents[name].ask(do, seconds, **arguments, **(each[name] if each else {}))
            except HostError as error:
                answers[name] = error

        threads = [threading.Thread(target=ask, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {name: answers[name] for name in names}

    def leave_out(self, names: Iterable[str]) -> None:
        """Hang up on these."""
        for name in names:
            agent = self.agents.pop(name)
            agent.close()
            agent.wait(PING_SECONDS)

    def lost(self, silent_seconds: float = LOST_SECONDS) -> list[HostError]:
        """Hosts whose agent has ended, or the way to it, or that have not answered for so long; with the reason."""
        return [
            agent.why_lost()
            for agent in list(self.agents.values())
            if agent.is_lost or agent.silent_seconds >= silent_seconds
        ]

    def close(self, seconds: float = 15.0) -> None:
        """Hang up everywhere, and wait."""
        self._closed.set()
        for agent in self.agents.values():
            agent.close()
        silent = {error.host for error in self.lost(SILENT_SECONDS)}
        deadline = time.monotonic() + seconds
        for name, agent in self.agents.items():
            agent.wait(0.1 if name in silent else max(0.1, deadline - time.monotonic()))

    def _ping(self) -> None:
        """A thread's work: agents that hear nothing end the ranks of their host."""
        while not self._closed.wait(PING_SECONDS):
            for agent in list(self.agents.values()):
                agent.note()


def _allow_open_files() -> None:
    """As many as this user may have: each host takes some, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
