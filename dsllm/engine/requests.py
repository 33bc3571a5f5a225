"""What a run is asked from outside: to stop, or to save and go on."""

from __future__ import annotations

import logging
import signal

from dsllm.engine.time_limit import TimeLimit

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class Requests:
    """SIGTERM, SIGINT, SIGUSR2 and a time limit end the run after the current step; SIGUSR1 saves and goes on.

    A request to one rank is one to all: they learn of it together, at the end of a step. DeepSpeed's launcher answers a
    Ctrl-C that every rank has already received with a SIGTERM of its own, so only a second SIGINT ends the run at once.
    """

    def __init__(self, limit: TimeLimit | None = None) -> None:
        self.limit = limit
        """When this rank asks for the end by the clock, if it does."""
        self._reason: str | None = None
        self._saves_asked = 0
        self._saves_told = 0
        self.stop = False
        """Whether all ranks have agreed to end."""
        self._save = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask_to_stop)
        signal.signal(signal.SIGUSR1, self._ask_to_save)
        # Held back by dsllm launch until somebody answers: see launch/supervisor.py.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGUSR2})

    @property
    def reason(self) -> str:
        """Why the run stops."""
        return self._reason or "a request to another rank"

    def own(self) -> list[float]:
        """Whether this rank is asked to stop, and to save: 1 or 0 each, to be summed over the ranks once a step."""
        reached = self.limit.reached() if self.limit else None
        self._reason = self._reason or reached
        asked = self._saves_asked
        wants_save, self._saves_told = asked > self._saves_told, asked
        return [float(self._reason is not None), float(wants_save)]

    def agree(self, stop: float, save: float) -> None:
        """What `own` of all ranks came to; for a step that is computed twice, either time."""
        self.stop, self._save = stop > 0, self._save or save > 0

    def take_save(self) -> bool:
        """Whether all ranks have agreed to save after this step; they are told once."""
        wanted, self._save = self._save, False
        return wanted

    def _ask_to_stop(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._reason is None:
            self._reason = signal.Signals(number).name
            logger.warning("%s: finishing this step, then saving; Ctrl-C again ends at once", self._reason)

    def _ask_to_save(self, number: int, frame: object) -> None:
        self._saves_asked += 1
        logger.info("SIGUSR1: saving after this step, then going on")
