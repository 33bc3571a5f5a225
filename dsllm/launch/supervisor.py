"""Starts the ranks of one attempt, watches them to their end, and leaves none of them behind on any host."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

from dsllm.errors import UserError
from dsllm.launch.agent import RANK_VARIABLES
from dsllm.launch.ending import Signs
from dsllm.launch.hosts import SILENT_SECONDS, HostError, Hosts
from dsllm.launch.launchers import Start
from dsllm.launch.requests import STOP_SIGNALS, Requests

POLL_SECONDS = 0.1
ENDING_SECONDS = 25.0
"""From the first sign of an end to the last rank's own: a watchdog needs 15 s to miss a rank, and 5 more to tell."""
SWEEP_SECONDS = 10.0
WORDS_SECONDS = 5.0
RELAY_SECONDS = 5.0
"""For what ranks have printed to reach a screen that is slow."""
PDSH_TELLS = re.compile(r"pdsh@[^:]+: (?P<host>[^:]+): ssh exited with exit code (?P<status>\d+)")
OF_DEEPSPEED = re.compile(r"\[[^]]+\] \[[A-Z]+\] \[(launch|real_accelerator)\.py:")
"""What DeepSpeed's launcher says on each host, whole command lines too; on another host it cannot be told not to."""
LABEL = re.compile(r"(?P<host>[^:\s]+): (?P<line>.*)", re.DOTALL)


class Screen(NamedTuple):
    """Where what the ranks print goes; None for this process's own streams."""

    out: IO[str] | None = None
    err: IO[str] | None = None


class Watched(NamedTuple):
    """An attempt that is over."""

    signs: Signs
    left_behind: dict[str, list[str]]
    """Command lines that had to be ended by force, by host."""
    not_swept: list[HostError]
    """Hosts that could not be looked at."""


def watch_ranks(
    starts: Sequence[Start],
    hosts: Hosts,
    launch: str,
    logs: str,
    requests: Requests,
    screen: Screen | None = None,
) -> Watched:
    """Start ranks and wait for them, whatever happens to them.

    `launch` is in the environment or on the command line of everything that belongs to the attempt; `logs` is where
    ranks write their last words.

    A Ctrl-C, SIGTERM, SIGHUP or SIGUSR2 goes to the ranks, on every host, which finish their step, save and end with 0;
    at SIGUSR1 they save and go on. DeepSpeed's launcher would die of it and leave them behind, or kill them after 30
    seconds; in a session of its own it never sees it. Where no rank runs yet, a signal to stop ends the attempt.

    Raises UserError where the launcher is not installed.
    """
    return _Attempt(hosts, launch, logs, requests, screen or Screen()).run(starts)


class _Attempt:
    def __init__(self, hosts: Hosts, launch: str, logs: str, requests: Requests, screen: Screen) -> None:
        self._hosts = hosts
        self._launch = launch
        self._logs = logs
        self._requests = requests
        self._screen = screen
        self._exits: dict[str, int] = {}
        self._relays: list[threading.Thread] = []
        self._ends_now = False
        self._started: list[tuple[Start, subprocess.Popen[str]]] = []

    def run(self, starts: Sequence[Start]) -> Watched:
        try:
            for start in starts:
                self._started.append((start, self._start(start)))
            self._wait()
        finally:
            # before the sweep: a host may be lost by it, and commands of this machine are ended
            lost = self._hosts.lost(SILENT_SECONDS)
            statuses = [(start.host, process.poll()) for start, process in self._started]
            left_behind, not_swept = self._sweep()
            _end([process for _, process in self._started])
        words = self._last_words([error.host for error in not_swept])
        self._finish_relays()
        exits = {host: status for host, status in statuses if host is not None and status}
        signs = Signs(
            statuses=[-signal.SIGKILL if status is None else status for _, status in statuses],
            exits={**exits, **self._exits},
            lost=lost,
            words=words,
            asked_by=self._requests.stop_asked_by,
        )
        return Watched(signs, left_behind, not_swept)

    def _start(self, start: Start) -> subprocess.Popen[str]:
        # A shell inside a job of Slurm has the variables of a rank and is none; what it starts would be taken for one.
        own = {
            name: value
            for name, value in os.environ.items()
            if name not in RANK_VARIABLES and (name == "PYTHONPATH" or not name.startswith(start.without))
        }
        is_relayed = start.host is not None or start.is_labelled
        try:
            process = subprocess.Popen(
                start.command,
                env={**own, **start.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if is_relayed else self._screen.out,
                stderr=subprocess.PIPE if is_relayed else self._screen.err,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=_hold_user_signals_back,
            )
        except FileNotFoundError:
            raise UserError(
                f"{start.command[0]}: not installed; install it (deepspeed by pip install 'dsllm[train]'), or choose "
                "another --launcher"
            ) from None
        if is_relayed:
            self._relay(process, start.host)
        return process

    def _wait(self) -> None:
        """Until all have ended; after the first sign that they will not end well, until those have that can be heard
        of, and no longer than a while."""
        deadline = None
        while running := [(start, process) for start, process in self._started if process.poll() is None]:
            self._hand_signals_on()
            if deadline is None and self._has_failed():
                deadline = time.monotonic() + ENDING_SECONDS
            if self._ends_now or (deadline is not None and self._is_over([start for start, _ in running], deadline)):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                running[0][1].wait(POLL_SECONDS)

    def _has_failed(self) -> bool:
        """Whether any start, host or way to one has."""
        statuses = [*(process.returncode for _, process in self._started), *self._exits.values()]
        return any(statuses) or bool(self._hosts.lost())

    def _is_over(self, running: Sequence[Start], deadline: float) -> bool:
        """Whether what still runs is waited for in vain: it is for hosts that no longer answer."""
        hosts = set(self._hosts.agents) if any(start.host is None for start in running) else set()
        awaited = (hosts | {start.host for start in running if start.host is not None}) - set(self._exits)
        silent = {error.host for error in self._hosts.lost(SILENT_SECONDS)}
        return time.monotonic() > deadline or bool(awaited and awaited <= silent)

    def _hand_signals_on(self) -> None:
        """To every rank. A terminal that is closed asks for the same end as SIGTERM. Where every host has answered that
        it has none, the end is now."""
        for received in self._requests.take():
            number = signal.SIGTERM if received == signal.SIGHUP else received
            counts = self._hosts.ask_all("send_signal", launch=self._launch, number=int(number)).values()
            if all(count == 0 for count in counts):
                is_stop = received in STOP_SIGNALS
                was_passed_on = self._passes_on(signal.SIGUSR2 if is_stop else received)
                self._ends_now = self._ends_now or (is_stop and not was_passed_on)

    def _passes_on(self, number: signal.Signals) -> bool:
        """To ranks that no agent of ours sees, because Slurm alone is asked: srun hands on SIGUSR1 and SIGUSR2."""
        handing_on = [process for start, process in self._started if start.hands_signals_on and process.poll() is None]
        for process in handing_on:
            process.send_signal(number)
        return bool(handing_on)

    def _relay(self, process: subprocess.Popen[str], host: str | None) -> None:
        """What comes from several hosts: lines of the first one as they are, of others under their name."""
        for stream, screen in (
            (process.stdout, self._screen.out or sys.stdout),
            (process.stderr, self._screen.err or sys.stderr),
        ):
            assert stream is not None
            thread = threading.Thread(target=self._copy, args=(stream, screen, host), daemon=True)
            thread.start()
            self._relays.append(thread)

    def _copy(self, stream: IO[str], screen: IO[str], host: str | None) -> None:
        """A thread's work: to the end of the stream."""
        for line in stream:
            told = PDSH_TELLS.match(line)
            if told is not None:
                self._exits[self._host_named(told["host"]) or told["host"]] = int(told["status"])
                continue
            name, words = self._parted(line, host)
            if OF_DEEPSPEED.match(words):
                continue
            is_first = name in (None, next(iter(self._hosts.agents)))
            with contextlib.suppress(OSError, ValueError):  # a screen that is gone is no fault of the run
                screen.write(words if is_first else f"{name}: {words}")
                screen.flush()

    def _finish_relays(self) -> None:
        deadline = time.monotonic() + RELAY_SECONDS
        for relay in self._relays:
            relay.join(max(0.0, deadline - time.monotonic()))

    def _parted(self, line: str, host: str | None) -> tuple[str | None, str]:
        """The host that a line comes from, if it is known, and the line itself."""
        match = LABEL.match(line) if host is None else None
        named = self._host_named(match["host"]) if match else None
        return (named, match["line"]) if match and named is not None else (host, line)

    def _host_named(self, label: str) -> str | None:
        """The host of a label of pdsh's, which leaves out a domain that all hosts have."""
        if label in self._hosts.agents:
            return label
        found = [name for name in self._hosts.agents if name.startswith(f"{label}.")]
        return found[0] if len(found) == 1 else None

    def _last_words(self, silent: Sequence[str]) -> list[Mapping[str, Any]]:
        """Of the ranks that failed, as the first host sees their folder; where it sees none, as the others do."""
        names = [name for name in self._hosts.agents if name not in silent]
        words: dict[int, Mapping[str, Any]] = {}
        for some in (names[:1], names[1:]):
            each: dict[str, dict[str, Any]] = {name: {} for name in some}
            answers = self._hosts.ask_all("last_words", WORDS_SECONDS, each, launch=self._launch, logs=self._logs)
            for answer in answers.values():
                if not isinstance(answer, HostError):
                    words.update({word["rank"]: word for word in answer})
            if words:
                break
        return sorted(words.values(), key=lambda word: (not word["is_own"], word["time"]))

    def _sweep(self) -> tuple[dict[str, list[str]], list[HostError]]:
        silent = {error.host: error for error in self._hosts.lost(SILENT_SECONDS)}
        each: dict[str, dict[str, Any]] = {name: {} for name in self._hosts.agents if name not in silent}
        answers = self._hosts.ask_all("sweep", SWEEP_SECONDS, each, launch=self._launch)
        failed = [*silent.values(), *(answer for answer in answers.values() if isinstance(answer, HostError))]
        left = {name: answer for name, answer in answers.items() if answer and not isinstance(answer, HostError)}
        return left, failed


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Commands of this machine that are still there, with what they have started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _hold_user_signals_back() -> None:
    """In what is started, until a rank answers them: their default is the end of a process, and Slurm sends them to
    each one of a job step, DeepSpeed's launchers among them.

    Ignored, and blocked besides: a blocked signal waits for its handler even where it is ignored meanwhile. Shells on
    the way unblock it.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
