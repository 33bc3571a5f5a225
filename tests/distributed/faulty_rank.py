"""dsllm/train.py, but one rank meets a fault in the middle of step 3: faulty_rank.py FAULT RANK, then its arguments."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from dsllm.engine import inputs
from dsllm.train import main

FAULT_AT_MICRO_BATCH = 5
"""Of two in a step: the second of the third step."""


def raise_alone() -> None:
    raise ValueError("this rank has had enough")


def lock_the_interpreter() -> None:
    """A C function that never returns and keeps the lock: no other thread of Python runs."""
    ctypes.PyDLL(None).pause()


FAULTS: dict[str, Callable[[], Any]] = {
    "sleeps": lambda: time.sleep(3600),
    "exits": lambda: os._exit(3),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raises": raise_alone,
    "locks": lock_the_interpreter,
}


def make_faulty(meet_fault: Callable[[], Any]) -> None:
    """What the loop reads from then on meets the fault on its way."""
    open_training = inputs.open_training

    def open_faulty(*arguments: Any) -> Callable[..., Iterator[Any]]:
        read = open_training(*arguments)

        def read_faulty(*position: Any) -> Iterator[Any]:
            for index, batch in enumerate(read(*position)):
                if index == FAULT_AT_MICRO_BATCH:
                    meet_fault()
                yield batch

        return read_faulty

    inputs.open_training = open_faulty


if __name__ == "__main__":
    local_rank, fault, rank, *arguments = sys.argv[1:]
    sys.argv = ["train.py", local_rank, *arguments]
    if os.environ["RANK"] == rank:
        make_faulty(FAULTS[fault])
    sys.exit(main())
