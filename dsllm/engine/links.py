"""Measures the network between hosts: a program with one rank on each, that the doctor starts everywhere at once.

Rank 0 writes a line of JSON, the fields of `dsllm.launch.doctor.facts.Links` with ranks in the place of hosts. Sizes
and repetitions follow from what the first messages take, so that a link of 1 MB/s is measured in the same seconds.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as distributed

SMALL_BYTES = 8
FIRST_BYTES = 2**16
LARGEST_BYTES = {"gloo": 2**26, "nccl": 2**28}
"""Enough for the rate of 100 Gbit/s adapters to be reached."""
LONG_ENOUGH_SECONDS = 0.05
"""A message that takes so long is not measured larger: latency is lost in it, unless the link is hopeless anyway."""
SMALL_REPEATS, LARGE_REPEATS = 50, 5
REPEATING_SECONDS = 0.3
"""For all repetitions of one message, at most, where one alone does not take longer."""
PAIRS_SECONDS = 20.0
"""For all rounds of the tournament together: of many hosts not every pair is measured."""


def main() -> None:
    """Meet, measure, and write. The environment has RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    backend, patience_seconds = sys.argv[1], float(sys.argv[2])
    torch.set_num_threads(1)
    number = int(os.environ["LOCAL_RANK"])
    if backend == "nccl":
        torch.cuda.set_device(number)
    distributed.init_process_group(
        backend,
        timeout=timedelta(seconds=patience_seconds),
        # NCCL: one communicator for all that follows, in the place of a new one for each pair
        device_id=torch.device("cuda", number) if backend == "nccl" else None,
    )
    measured = measure(backend)
    if distributed.get_rank() == 0:
        sys.stdout.write(json.dumps(measured) + "\n")
        sys.stdout.flush()
    distributed.barrier()
    distributed.destroy_process_group()


def measure(backend: str) -> dict[str, object]:
    """On every rank at the same time; the result is rank 0's."""
    size, device = distributed.get_world_size(), "cuda" if backend == "nccl" else "cpu"
    small = torch.zeros(SMALL_BYTES, dtype=torch.uint8, device=device)
    latency = repeated(lambda: all_reduce(small), SMALL_REPEATS)
    large = growing(all_reduce, device, LARGEST_BYTES[backend])
    seconds = repeated(lambda: all_reduce(large), LARGE_REPEATS)
    pairs = tournament(device, LARGEST_BYTES[backend])
    return {
        "backend": backend,
        "all_reduce_latency_seconds": latency,
        "bus_bytes_per_second": 2 * (size - 1) / size * large.numel() / seconds,
        "pairs": pairs,
        "num_pairs": size * (size - 1) // 2,
    }


def all_reduce(message: torch.Tensor) -> None:
    """Until its result is there."""
    distributed.all_reduce(message)
    finish(message)


def finish(message: torch.Tensor) -> None:
    """Wait for the GPU, which is only told what to do."""
    if message.is_cuda:
        torch.cuda.synchronize()


def growing(exchange: Callable[[torch.Tensor], None], device: str, largest: int) -> torch.Tensor:
    """A message that takes LONG_ENOUGH_SECONDS in `exchange`, in which all ranks take part, or is the largest."""
    num_bytes = FIRST_BYTES
    while True:
        message = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        exchange(message)  # connections are opened by the first
        if num_bytes >= largest or slowest(timed(lambda: exchange(message)), device) >= LONG_ENOUGH_SECONDS:  # noqa: B023
            return message
        num_bytes *= 4


def repeated(exchange: Callable[[], None], repeats: int) -> float:
    """The median of as many repetitions as REPEATING_SECONDS allow, at least three."""
    exchange()
    once = timed(exchange)
    wanted = max(3, min(repeats, int(REPEATING_SECONDS / max(once, 1e-6))))
    return statistics.median(timed(exchange) for _ in range(agreed(wanted)))


def timed(exchange: Callable[[], None]) -> float:
    """Seconds of one."""
    started = time.perf_counter()
    exchange()
    return time.perf_counter() - started


def agreed(number: int) -> int:
    """Rank 0's, on every rank."""
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(number, device=device)
    distributed.broadcast(shared, src=0)
    return int(shared)


def slowest(seconds: float, device: str) -> float:
    """The most that a rank took, on every rank."""
    shared = torch.tensor(seconds, dtype=torch.float64, device=device)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return float(shared)


# Pairs


def tournament(device: str, largest: int) -> list[tuple[int, int, float, float]]:
    """`(first, second, latency_seconds, bytes_per_second)` of each pair; in a round every rank has one other.

    Rank 0 ends it between rounds when PAIRS_SECONDS are over.
    """
    rank, size = distributed.get_rank(), distributed.get_world_size()
    started, own = time.monotonic(), []
    for games in rounds(size):
        for first, second in games:
            if rank in (first, second):
                link = Link(rank == first, second if rank == first else first, device, largest)
                measured = link.measured()
                if rank == first:
                    own.append((first, second, *measured))
        if not agreed(time.monotonic() - started < PAIRS_SECONDS):
            break
    of_all: list[list[tuple[int, int, float, float]] | None] = [None] * size
    distributed.all_gather_object(of_all, own)
    return sorted(pair for pairs in of_all for pair in pairs or [])


def rounds(size: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of ranks once, in rounds where no rank has two games: the circle method, in which one stays seated."""
    seats: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        games = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in games if a is not None and b is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]


class Link:
    """Between this rank and another, that measures at the same time."""

    def __init__(self, is_first: bool, other: int, device: str, largest: int) -> None:
        self._is_first, self._other, self._device, self._largest = is_first, other, device, largest
        self._small = torch.zeros(SMALL_BYTES, dtype=torch.uint8, device=device)

    def measured(self) -> tuple[float, float]:
        """Latency one way, and bytes a second in the worse direction; both meant for the first rank only."""
        latency = self._repeated(lambda: self._exchange(self._small, self._small), SMALL_REPEATS) / 2
        return latency, min(self._rate(latency, sends=True), self._rate(latency, sends=False))

    def _rate(self, latency: float, sends: bool) -> float:
        """Bytes a second to the other, or from it: a large message one way, and a word back."""
        num_bytes = FIRST_BYTES
        while True:
            message = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
            there, back = (message, self._small) if sends else (self._small, message)
            seconds = self._repeated(lambda: self._exchange(there, back), LARGE_REPEATS)  # noqa: B023
            grows = seconds < LONG_ENOUGH_SECONDS + 2 * latency and num_bytes < self._largest
            if not self._agreed(grows):
                return num_bytes / max(seconds - latency, 1e-9)
            num_bytes *= 4

    def _exchange(self, there: torch.Tensor, back: torch.Tensor) -> None:
        """`there` from the first to the second, then `back`."""
        if self._is_first:
            distributed.send(there, self._other)
            distributed.recv(back, self._other)
        else:
            distributed.recv(there, self._other)
            distributed.send(back, self._other)
        finish(back)

    def _repeated(self, exchange: Callable[[], None], repeats: int) -> float:
        exchange()
        once = timed(exchange)
        wanted = max(1, min(repeats, int(REPEATING_SECONDS / max(once, 1e-6))))
        return statistics.median(timed(exchange) for _ in range(self._agreed(wanted)))

    def _agreed(self, number: int) -> int:
        """The first's number, on both."""
        shared = torch.tensor(number, device=self._device)
        if self._is_first:
            distributed.send(shared, self._other)
        else:
            distributed.recv(shared, self._other)
        return int(shared)


if __name__ == "__main__":
    main()
