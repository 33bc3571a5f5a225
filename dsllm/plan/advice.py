"""What to change when a run does not fit a GPU: the smallest change that is predicted to fit.

Changes are tried in the order of what they cost, each from its mildest form:

1. a smaller micro-batch: gradients add up over more of them, the optimisation stays the same, and only kernels that
   are too small to fill the GPU take longer;
2. a higher ZeRO stage: the same numbers; stages 1 and 2 communicate as much as plain data parallelism, stage 3 half as
   much again (arXiv:1910.02054, section 7);
3. the loss in chunks: the same numbers, a few per cent of a step;
4. activation checkpointing, of every second block and then of all: a sixth, a third more arithmetic, since forward is
   a third of a step and is computed again (arXiv:1604.06174);
5. more GPUs: faster, but more money an hour, and they may not be there;
6. optimizer states on the host: every step waits for the host's Adam and its link (arXiv:2101.06840);
7. parameters on the host: every forward and backward waits for the link.

One change before two, two before three; of as many, those whose costliest is cheapest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from dsllm.plan.hardware import Gpu
from dsllm.plan.memory import MemoryEstimate
from dsllm.plan.search import HOST_SHARE
from dsllm.plan.way import Way, changed_settings
from dsllm.plan.workload import CHECKPOINTINGS

LARGEST_WORLD = 4096
LARGEST_GRADED = 3
"""Changes at once of which every form is tried."""


@dataclass(frozen=True)
class Advice:
    """The smallest change that fits, or the one that comes nearest."""

    given: Way
    changed: Way
    estimate: MemoryEstimate
    fits: bool

    @property
    def settings(self) -> dict[str, str | int]:
        """The fields of the spec that change, and their new values."""
        return changed_settings(self.given, self.changed)

    @property
    def world_size(self) -> int | None:
        """The number of ranks, where it changes."""
        return None if self.changed.world_size == self.given.world_size else self.changed.world_size


def advise(given: Way, gpu: Gpu, predict: Callable[[Way], MemoryEstimate], more_ranks: bool = True) -> Advice:
    """The smallest change after which the GPU and its host hold the run, by `predict`; else the nearest miss.

    `more_ranks` says whether there may be more of them. Nothing fits a GPU without arithmetic in the run's precision.
    """
    nearest: tuple[Way, MemoryEstimate] | None = None
    changes = [change for change in CHANGES if more_ranks or change is not _more_ranks]
    for changed in _attempts(given, changes):
        estimate = predict(changed)
        if not _host_holds(changed, gpu, estimate):
            continue
        if estimate.fits_on(gpu):
            return Advice(given, changed, estimate, fits=True)
        if nearest is None or estimate.peak.total_bytes < nearest[1].peak.total_bytes:
            nearest = changed, estimate
    changed, estimate = nearest or (given, predict(given))
    return Advice(given, changed, estimate, fits=False)


def _host_holds(way: Way, gpu: Gpu, estimate: MemoryEstimate) -> bool:
    """Whether each node has memory for what its ranks offload."""
    ranks_per_node = min(way.world_size, gpu.gpus_per_node)
    return estimate.host_bytes * ranks_per_node <= way.world_size * HOST_SHARE * gpu.host_memory_bytes


def _attempts(given: Way, changes: Sequence[Change]) -> Iterator[Way]:
    """Every combination of changes, the smallest and cheapest first; of more than a few only their strongest forms."""
    for size in range(1, len(changes) + 1):
        # the costliest change decides, then the next
        ordered = sorted(combinations(range(len(changes)), size), key=lambda chosen: chosen[::-1])
        for chosen in ordered:
            combination = [changes[index] for index in chosen]
            if size <= LARGEST_GRADED:
                yield from _applied(given, combination)
            else:
                yield _at_their_strongest(given, combination)


def _applied(way: Way, changes: Sequence[Change]) -> Iterator[Way]:
    if not changes:
        yield way
        return
    for changed in changes[0](way):
        yield from _applied(changed, changes[1:])


def _at_their_strongest(way: Way, changes: Sequence[Change]) -> Way:
    for change in changes:
        for changed in change(way):
            way = changed
    return way


# --- the changes, each from its mildest form --------------------------------------------------------------------------

Change = Callable[[Way], Iterator[Way]]


def _smaller_micro_batch(way: Way) -> Iterator[Way]:
    for size in range(way.micro_batch_size - 1, 0, -1):
        if way.run.global_batch_size % (size * way.world_size) == 0:
            yield replace(way, micro_batch_size=size)


def _higher_stage(way: Way) -> Iterator[Way]:
    for stage in range(way.run.zero.stage + 1, 4):
        yield replace(way, run=way.run.at_stage(stage))


def _chunked_loss(way: Way) -> Iterator[Way]:
    if way.run.loss == "plain":
        yield replace(way, run=replace(way.run, loss="chunked"))


def _more_checkpointing(way: Way) -> Iterator[Way]:
    for checkpointing in CHECKPOINTINGS[CHECKPOINTINGS.index(way.run.activation_checkpointing) + 1 :]:
        yield replace(way, run=replace(way.run, activation_checkpointing=checkpointing))


def _more_ranks(way: Way) -> Iterator[Way]:
    if not way.has_batch:
        factors = [2**power for power in range(1, 13) if way.world_size * 2**power <= LARGEST_WORLD]
        for factor in factors:
            run = replace(way.run, global_batch_size=way.run.global_batch_size * factor)
            yield replace(way, run=run, world_size=way.world_size * factor)
        return
    for world_size in range(way.world_size + 1, LARGEST_WORLD + 1):
        if way.run.global_batch_size % (world_size * way.micro_batch_size) == 0:
            yield replace(way, world_size=world_size)


def _optimizer_on_host(way: Way) -> Iterator[Way]:
    zero = way.run.zero
    if zero.stage >= 1 and zero.offload_optimizer == "none":
        yield replace(way, run=replace(way.run, zero=replace(zero, offload_optimizer="cpu")))


def _parameters_on_host(way: Way) -> Iterator[Way]:
    zero = way.run.zero
    if zero.stage == 3 and zero.offload_param == "none":
        yield replace(way, run=replace(way.run, zero=replace(zero, offload_param="cpu")))


CHANGES: tuple[Change, ...] = (
    _smaller_micro_batch,
    _higher_stage,
    _chunked_loss,
    _more_checkpointing,
    _more_ranks,
    _optimizer_on_host,
    _parameters_on_host,
)
