"""What a launch is asked from outside, from its start to its end, between its attempts too."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1)
LOOK_SECONDS = 0.1


class Requests:
    """A context, within which signals are kept until somebody takes them. Those that are ignored, as by nohup, stay so.

    Ctrl-Z is ignored: it would stop the launch and not its ranks, which end where they hear of it no more.
    """

    def __init__(self) -> None:
        self.stop_asked_by: str | None = None
        """The first signal that asked for the end, once one has."""
        self._received: list[signal.Signals] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Requests:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> list[signal.Signals]:
        """What has come since the last time, oldest first."""
        taken = self._received[:]
        del self._received[: len(taken)]
        return taken

    def wait(self, seconds: float) -> None:
        """Until so long, or until the end is asked for."""
        deadline = time.monotonic() + seconds
        while self.stop_asked_by is None and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        self._received.append(received)
        if received in STOP_SIGNALS:
            self.stop_asked_by = self.stop_asked_by or received.name
