"""Runs DeepSpeed's launcher, and hands the signals that a run answers to the ranks themselves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

from dsllm.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run_launcher(command: Sequence[str], environment: Mapping[str, str], stdout: IO[str] | None = None) -> int:
    """Run `command` with additions to the environment until it ends. Returns its exit status as a shell would.

    What launcher and ranks print goes to `stdout`, to this process's own when absent.

    A Ctrl-C, SIGTERM, SIGHUP or SIGUSR2 goes to the ranks, which finish their step, save and end with 0; at SIGUSR1
    they save and go on. DeepSpeed's launcher would die of it and leave them behind, or kill them after 30 seconds; in a
    session of its own it never sees it. On several hosts the ranks are not below it: there it gets the signal, and
    gives them those 30 seconds.
    """
    launchers: list[subprocess.Popen[bytes]] = []
    early: list[signal.Signals] = []

    def hand_on(number: int, frame: object) -> None:
        if launchers:
            _hand_on(launchers[0], signal.Signals(number))
        else:  # perhaps it runs already, and Popen has not returned
            early.append(signal.Signals(number))

    # In place before the launcher starts: a signal that ends dsllm alone would leave the ranks running.
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, hand_on) for number in handled}
    try:
        launchers.append(
            subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=stdout,
                start_new_session=True,
                preexec_fn=_hold_user_signals_back,
            )
        )
        for number in early:
            _hand_on(launchers[0], number)
        status = launchers[0].wait()
    except FileNotFoundError:
        raise UserError("deepspeed: not installed; pip install 'dsllm[train]'") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _hold_user_signals_back() -> None:
    """In what is started, until a rank answers them: their default is the end of a process, and Slurm sends them to
    each one of a job step, DeepSpeed's launchers among them.

    Ignored, and blocked besides: a blocked signal waits for its handler even where it is ignored meanwhile. Shells on
    the way unblock it.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})


def _hand_on(launcher: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To every rank on this host; to the launcher where it has none here, as on the way to other hosts.

    A terminal that is closed asks for the same end as SIGTERM.
    """
    if number == signal.SIGHUP:
        number = signal.SIGTERM
    ranks = _ranks_below(launcher.pid)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, number)
    if not ranks:
        launcher.send_signal(number)


def _ranks_below(launcher: int) -> list[int]:
    """Processes that DeepSpeed has given a rank, without what those have started themselves."""
    import psutil  # comes with DeepSpeed

    try:
        children = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    ranks = []
    for child in children:
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "RANK" in child.environ() and child.ppid() not in ranks:
                ranks.append(child.pid)
    return ranks
