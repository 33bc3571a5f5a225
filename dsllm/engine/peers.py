"""Whether another rank is still there."""

from __future__ import annotations

import contextlib
import signal

import psutil

from dsllm.engine.reports import Finding, Report

SILENT_SECONDS = 15.0
"""Without a report, which a thread makes every two seconds whatever the rank is at."""
GONE_SECONDS = 3.0
"""Between the end of a process and the verdict, since its last words may be under way."""
LAST_WORDS_SECONDS = 1.0
"""For a process that is killed to write where it was."""


class Peer:
    """One rank, as another one sees it: by its reports and, on the same host, by its process.

    Time is counted in looks, not by the clock: a job that was suspended as a whole goes on as if nothing had been.
    """

    def __init__(self, rank: int, host: str, process: psutil.Process | None) -> None:
        """`process` is None for a rank on another host."""
        self.process = process
        self._last = Report(rank, host, beat=-1)
        self._silent_seconds = 0.0
        self._gone_seconds = 0.0

    def look(self, report: Report | None, seconds: float) -> Finding | None:
        """What is wrong, if anything, `seconds` after the last look; `report` is the latest that was read."""
        is_new = report is not None and report.beat != self._last.beat
        self._silent_seconds = 0.0 if is_new else self._silent_seconds + seconds
        self._gone_seconds = self._gone_seconds + seconds if self._has_ended() else 0.0
        self._last = report or self._last
        if self._last.is_leaving:
            return None
        name, place, ranks = self._last.name, self._last.place, (self._last.rank,)
        if self._gone_seconds >= GONE_SECONDS:
            return Finding("lost_rank", f"{name}: its process ended without a word, last in {place}", ranks)
        if self.is_silent:
            return Finding("lost_host", f"{name}: not heard of for {SILENT_SECONDS:g} s, last in {place}", ranks)
        return None

    @property
    def is_silent(self) -> bool:
        return self._silent_seconds >= SILENT_SECONDS

    @property
    def is_there(self) -> bool:
        """As far as this rank can see."""
        return not (self.is_silent or self._has_ended())

    def kill_if_silent(self) -> None:
        """A process of this machine that is stopped, or whose interpreter is locked, would stay behind.

        SIGABRT first, at which Python's fault handler writes its stacks into its log, where it can.
        """
        if not self.is_silent or self.process is None:
            return
        with contextlib.suppress(psutil.Error):
            self.process.send_signal(signal.SIGABRT)
            with contextlib.suppress(psutil.TimeoutExpired):
                self.process.wait(LAST_WORDS_SECONDS)
            self.process.kill()

    def _has_ended(self) -> bool:
        if self.process is None:
            return False
        try:
            return not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            return True
