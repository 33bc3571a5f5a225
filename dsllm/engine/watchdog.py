"""Ends a run, on every rank, in which one rank hangs, has died or has failed alone: none waits for it for ever."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import psutil
import torch.distributed as distributed

from dsllm.engine import last_words, ranks
from dsllm.engine.activity import LONG_SECONDS, Activity
from dsllm.engine.noticeboard import Noticeboard, Verdict
from dsllm.engine.peers import SILENT_SECONDS, Peer
from dsllm.engine.rank_output import log_file
from dsllm.engine.reports import Finding, Report, find_hang
from dsllm.errors import DsllmError, TrainingError
from dsllm.launch.ending import GOES_ON

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0
"""For the main thread to come to the same end by itself; and for the others to read why rank 0 ends."""
BACKSTOP_SECONDS = 30.0
"""Beyond the limit, for a rank whose interpreter is locked, so that no thread of it can end it."""
EXIT_STATUS = 1
STDERR = 2  # by its number: sys.stderr may be none that a fault handler can write to
COLLECTIVES = os.path.dirname(distributed.__file__)

_runs = itertools.count()  # the same number on every rank, since they start each run together


def patience_seconds(hang_seconds: float) -> float:
    """How long a collective may wait before it fails by itself: longer than it takes to find out who hangs."""
    return max(hang_seconds, LONG_SECONDS) + 2 * BACKSTOP_SECONDS


@contextlib.contextmanager
def watch(world: ranks.World, logs: Path, hang_seconds: float) -> Iterator[Activity]:
    """Within, no rank waits for ever; what is yielded is to be told where this rank is.

    Collective, at its start and at its end. What this rank raises ends the others. Where it raises only because another
    one failed or died, a TrainingError with that rank's reason is raised in its place.
    """
    with log_file(logs, world.rank).open("a") as log, _fault_handler(log):
        watchdog = Watchdog(world, logs, log, hang_seconds)
        watchdog.start()
        try:
            yield watchdog.activity
            watchdog.activity("ending")
            distributed.barrier()
        except BaseException as error:
            cause = watchdog.explain(error)
            if cause is None:
                raise
            raise cause from error
        finally:
            watchdog.stop()


class Watchdog(threading.Thread):
    """Looks twice a second at this rank and at those that it watches, and ends the process where the run cannot go on.

    Rank 0 watches all, and alone decides what hangs. The others watch rank 0 and those on their own machine, whose
    processes they can see.
    """

    def __init__(self, world: ranks.World, logs: Path, log: TextIO, hang_seconds: float) -> None:
        """`logs` takes this rank's last words, `log` the stacks. Collective."""
        super().__init__(name="watchdog", daemon=True)
        self.activity = Activity()
        self._rank, self._host = world.rank, socket.gethostname()
        self._logs, self._log = logs, log
        self._hang_seconds = hang_seconds
        self._beats = itertools.count()
        self._idle_seconds = 0.0
        self._verdict_age_seconds = 0.0
        self._is_leaving = False
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        """Taken for good by the thread that ends this rank: this one, or the main thread that raised."""
        everyone = ranks.gather((self._host, _machine(), os.getpid()))
        self._peers = {
            rank: Peer(rank, host, psutil.Process(pid) if machine == _machine() else None)
            for rank, (host, machine, pid) in enumerate(everyone)
            if rank != self._rank and (0 in (rank, self._rank) or machine == _machine())
        }
        self._board = Noticeboard(f"dsllm/{next(_runs)}", self._report, sorted({self._rank, *self._peers}))

    def start(self) -> None:
        """Collective."""
        self._board.open()
        distributed.barrier()
        self._board.start()
        super().start()

    def run(self) -> None:
        """Until `stop`, or the end of the process."""
        ticks = self.activity.ticks
        while not self._stopped.wait(POLL_SECONDS):
            # Counted in looks, not by the clock: a suspended job goes on as if nothing had been.
            self._idle_seconds = self._idle_seconds + POLL_SECONDS if ticks == self.activity.ticks else 0.0
            ticks = self.activity.ticks
            self._arm_backstop()
            self._end_if_it_must()

    def explain(self, error: BaseException) -> DsllmError | None:
        """Tell the other ranks why the main thread ends. Returns what is to be raised in place of `error`, if anything.

        Where a connection broke, its other end has failed or died; then this waits until it is known who.
        """
        is_broken_connection = _is_broken_connection(error)
        if is_broken_connection:
            self._board.wait_for_verdict(SILENT_SECONDS + GRACE_SECONDS)
        self._ending.acquire()  # or wait here for the end of the process
        logger.error("ends by %s: %s", type(error).__name__, error, extra={"on_screen": False})
        reason = f"rank {self._rank} on {self._host}: {type(error).__name__}: {_first_line(error)}"
        finding = Finding(last_words.cause_of(error), reason, (self._rank,))
        verdict = self._board.verdict or self._board.propose(finding, GRACE_SECONDS)
        self._leave()
        is_known_to_all = isinstance(error, DsllmError) and not is_broken_connection
        if verdict.by_rank == self._rank or is_known_to_all:
            return None
        return TrainingError(
            verdict.finding.reason + GOES_ON,
            cause=verdict.finding.cause,
            is_own=self._rank in verdict.finding.ranks,
        )

    def stop(self) -> None:
        """Say goodbye, and look no more."""
        self._stopped.set()
        self._leave()
        self.join(GRACE_SECONDS)

    def _end_if_it_must(self) -> None:
        """With the process, where there is a reason to."""
        self._verdict_age_seconds += POLL_SECONDS if self._board.verdict else 0.0
        finding = self._find_fault()
        is_due = self._verdict_age_seconds >= GRACE_SECONDS or finding is not None
        if not is_due or not self._ending.acquire(blocking=False):
            return
        verdict = self._board.verdict
        if verdict is None:
            assert finding is not None
            verdict = self._board.propose(finding, GRACE_SECONDS)
        self._end_process(verdict)

    def _find_fault(self) -> Finding | None:
        """What ends the run, as far as this rank can see, where no rank has seen it yet."""
        if self._board.verdict is not None:
            return None
        reports = self._board.reports
        faults = [peer.look(reports.get(rank), POLL_SECONDS) for rank, peer in self._peers.items()]
        hang = find_hang(list(reports.values())) if self._rank == 0 and reports else None
        return next((fault for fault in [*faults, hang] if fault is not None), None)

    def _end_process(self, verdict: Verdict) -> None:
        faulthandler.dump_traceback(self._log)
        for peer in self._peers.values():
            peer.kill_if_silent()
        is_first = verdict.by_rank == self._rank
        cause, reason, about = verdict.finding
        message = reason + GOES_ON
        last_words.write(self._logs, self._rank, cause, EXIT_STATUS, message, is_own=self._rank in about)
        logger.critical("%s", message, extra={"on_screen": is_first or self._rank == 0})
        self._leave()
        logging.shutdown()
        os._exit(EXIT_STATUS)

    def _leave(self) -> None:
        """Rank 0 takes the store with it: it stays until the others know why, or are gone."""
        if self._is_leaving:
            return
        self._is_leaving = True
        if self._rank == 0 and self._board.verdict:
            self._board.wait_for_readers(self._who_is_there, GRACE_SECONDS)
        self._board.close(GRACE_SECONDS)

    def _who_is_there(self) -> list[int]:
        return [rank for rank, peer in self._peers.items() if peer.is_there]

    def _report(self) -> Report:
        return Report(
            rank=self._rank,
            host=self._host,
            beat=next(self._beats),
            ticks=self.activity.ticks,
            step=self.activity.step,
            phase=self.activity.phase,
            idle_seconds=self._idle_seconds,
            allowed_seconds=self.activity.allowed_seconds(self._hang_seconds),
            waits=self._idle_seconds > 0 and _is_in_a_collective(),
            is_leaving=self._is_leaving or self._board.verdict is not None,
        )

    def _arm_backstop(self) -> None:
        """Without this thread, which needs the interpreter, Python's fault handler ends the process."""
        seconds = self.activity.allowed_seconds(self._hang_seconds) + BACKSTOP_SECONDS
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._log)


@contextlib.contextmanager
def _fault_handler(log: TextIO) -> Iterator[None]:
    """Stacks at a crash go to the rank's log."""
    was_enabled = faulthandler.is_enabled()
    faulthandler.enable(log)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        if was_enabled:
            faulthandler.enable(STDERR)


def _is_in_a_collective() -> bool:
    """Whether a thread of this process stands in torch.distributed: it has come to a collective, and waits there."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if COLLECTIVES in frame.f_code.co_filename:
                return True
            frame = frame.f_back
    return False


def _is_broken_connection(error: BaseException | None) -> bool:
    """Whether this error, or one that it came from, says that another rank no longer answers."""
    while error is not None:
        if isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _machine() -> str:
    """The same for processes that see each other by their numbers; names of hosts are not, in containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
