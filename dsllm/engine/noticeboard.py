"""What the ranks of a run tell each other beside its collectives, through the store in which they met."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch.distributed as distributed

from dsllm.engine.reports import Finding, Report

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 2.0
READERS_POLL_SECONDS = 0.1
_VERDICT = "verdict"


class Verdict(NamedTuple):
    """Why the run ends before its time: the first reason that any rank gave."""

    by_rank: int
    finding: Finding


class Noticeboard(threading.Thread):
    """Every two seconds it posts this rank's report, and reads those of some ranks and the verdict.

    The store lives in rank 0's process. Where that is stopped a call waits for ever, whatever the time limit: hence a
    thread of its own, on a connection of its own. What it has read is seen without waiting for it.
    """

    def __init__(self, run: str, make_report: Callable[[], Report], read_ranks: Iterable[int]) -> None:
        """`run` tells apart the runs of one process. `read_ranks` are those whose reports are read."""
        super().__init__(name="noticeboard", daemon=True)
        # The connection that the process group has is locked while the main thread waits in it.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = distributed.PrefixStore(run, distributed.TCPStore(address, port, is_master=False))
        self._make_report = make_report
        self._read_ranks = list(read_ranks)
        self._proposal: Finding | None = None
        self._has_verdict = threading.Event()
        self._is_closed = False
        self._wake = threading.Event()
        self.reports: dict[int, Report] = {}
        self.verdict: Verdict | None = None
        self._rank = 0

    def open(self) -> None:
        """Post the first report. The ranks must meet between this and `start`: reading waits for what is not there."""
        self._rank = self._post()
        if self._rank == 0:
            self._store.set(_VERDICT, "")

    def wait_for_verdict(self, timeout_seconds: float) -> Verdict | None:
        """The verdict as soon as there is one."""
        self._has_verdict.wait(timeout_seconds)
        return self.verdict

    def propose(self, finding: Finding, timeout_seconds: float) -> Verdict:
        """Make `finding` the verdict unless there is one. Returns what is; `finding` too where the store is silent."""
        self._proposal = finding
        self._wake.set()
        self._has_verdict.wait(timeout_seconds if self.is_alive() else 0)
        return self.verdict or Verdict(self._rank, finding)

    def wait_for_readers(self, get_ranks: Callable[[], Iterable[int]], timeout_seconds: float) -> None:
        """Until each of those ranks has read the verdict, or leaves by itself."""
        deadline = time.monotonic() + timeout_seconds
        while any(not self.reports[rank].is_leaving for rank in get_ranks()) and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(READERS_POLL_SECONDS)

    def close(self, timeout_seconds: float) -> None:
        """Post a last report, and no more."""
        self._is_closed = True
        self._wake.set()
        self.join(timeout_seconds)

    def run(self) -> None:
        """Until it is closed, or the store is gone: then the reports no longer change.

        With a verdict a rank has nothing more to learn here, but rank 0 sees who has read it.
        """
        is_last = False
        while not is_last:
            is_last = self._is_closed
            try:
                self._exchange()
            except RuntimeError as error:  # of torch.distributed
                logger.warning(
                    "the store in rank 0 is gone: %s", str(error).splitlines()[0], extra={"on_screen": False}
                )
                return
            is_last = is_last or (self.verdict is not None and self._rank != 0)
            if not is_last:
                self._wake.wait(INTERVAL_SECONDS)
                self._wake.clear()

    def _exchange(self) -> None:
        self._post()
        if self._proposal is not None and self.verdict is None:
            self._store.compare_set(_VERDICT, "", json.dumps([self._rank, self._proposal]))
        verdict, *texts = self._store.multi_get([_VERDICT, *map(str, self._read_ranks)])
        self.reports = {report.rank: report for report in map(Report.from_json, texts)}
        if verdict and self.verdict is None:
            by_rank, (cause, reason, ranks) = json.loads(verdict)
            self.verdict = Verdict(by_rank, Finding(cause, reason, tuple(ranks)))
            self._post()  # that this rank knows
            self._has_verdict.set()

    def _post(self) -> int:
        report = self._make_report()
        self._store.set(str(report.rank), report.to_json())
        return report.rank
