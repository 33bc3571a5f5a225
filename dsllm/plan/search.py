"""The choices that dsllm makes for a run: micro-batch size, ZeRO stage, checkpointing, offload, and on which GPUs."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from dsllm.errors import UserError
from dsllm.plan.batch import micro_batch_choices
from dsllm.plan.cost import Cost, Machine, run_cost, step_time
from dsllm.plan.hardware import Gpu
from dsllm.plan.memory import FITTING_SHARE, MemoryEstimate, estimate_memory
from dsllm.plan.work import Kernels
from dsllm.plan.workload import CHECKPOINTINGS, Device, OffloadDevice, Workload
from dsllm.units import format_bytes

HOST_SHARE = 0.9
"""Share of a node's memory that offloading may take: the rest is for the system, the text and its readers."""

RESOLUTION = 0.03
"""Difference in throughput below which the prediction cannot tell two ways apart, and the plainer one is taken."""

OFFLOADS: dict[int, tuple[tuple[OffloadDevice, OffloadDevice], ...]] = {
    0: (("none", "none"),),
    1: (("none", "none"), ("cpu", "none")),
    2: (("none", "none"), ("cpu", "none")),
    3: (("none", "none"), ("cpu", "none"), ("cpu", "cpu")),
}
"""Where optimizer states and parameters may live, by stage."""


def choose_micro_batch(
    run: Workload,
    world_size: int,
    device_memory_bytes: int,
    device: Device = "cuda",
    runtime_bytes: int | None = None,
    reserved_ratio: float = 1.0,
) -> int:
    """Sequences per forward on each rank: the run's own number, or for `auto` the largest that is predicted to fit.

    Only sizes that divide a rank's share of the global batch are considered, and 1 is taken where nothing fits: the
    estimate may be wrong, and the run is the judge. What the device holds beside tensors may be given. Raises UserError
    where the batch does not divide over the ranks.
    """
    if run.micro_batch_size is not None:
        return run.micro_batch_size
    sizes = micro_batch_choices(run.global_batch_size, world_size)

    def fits(size: int) -> bool:
        memory = estimate_memory(
            run, world_size, size, device=device, runtime_bytes=runtime_bytes, reserved_ratio=reserved_ratio
        )
        return memory.fits(device_memory_bytes)

    return max(filter(fits, sizes), default=1)


@lru_cache(maxsize=50_000)
def _tensors(run: Workload, world_size: int, micro_batch_size: int, device: Device) -> MemoryEstimate:
    """The estimate without a runtime, kept: a comparison asks for each one once for every GPU."""
    return estimate_memory(run, world_size, micro_batch_size, device=device, runtime_bytes=0)


def _memory_on(machine: Machine, run: Workload, micro_batch_size: int) -> MemoryEstimate:
    gpu = machine.gpu
    tensors = _tensors(run, machine.world_size, micro_batch_size, "cpu" if gpu.is_cpu else "cuda")
    return tensors.with_runtime(gpu.runtime_bytes, gpu.reserved_ratio)


@dataclass(frozen=True)
class Conditions:
    """What holds for every candidate of a search, beside the run and the machine."""

    kernels: Kernels = "eager"
    pace: float = 1.0
    """Measured over predicted seconds of a step."""
    node_price: float | None = None
    """Dollars an hour for each node, in the place of the catalogue's."""
    evaluated_steps: float = 0.0
    """What evaluation reads in the whole run, in global batches."""


@dataclass(frozen=True)
class Fit:
    """A way to run that is predicted to fit, and what it comes to."""

    run: Workload
    machine: Machine
    micro_batch_size: int
    memory: MemoryEstimate
    cost: Cost

    @property
    def accumulation_steps(self) -> int:
        return self.run.global_batch_size // (self.micro_batch_size * self.machine.world_size)


@dataclass(frozen=True)
class Misfit:
    """A way to run that is not predicted to fit, why, and by how many bytes (0 where it is not about bytes)."""

    run: Workload
    machine: Machine
    reason: str
    short_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Every way to run on one machine: what fits from the fastest, what does not from the nearest miss."""

    machine: Machine
    fits: tuple[Fit, ...]
    misfits: tuple[Misfit, ...]

    def recommended(self, given: Fit | Misfit | None = None) -> Fit | None:
        """Of the ways that are as good as the fastest the given one, else the plainest; None where nothing fits."""
        if not self.fits:
            return None
        enough = (1 - RESOLUTION) * self.fits[0].cost.tokens_per_second
        if isinstance(given, Fit) and given.cost.tokens_per_second >= enough:
            return given
        return min((fit for fit in self.fits if fit.cost.tokens_per_second >= enough), key=_complexity)


def _complexity(fit: Fit) -> tuple[int, float, int, float]:
    """Offload, stage and checkpointing each cost robustness; then the faster one."""
    zero = fit.run.zero
    offloaded = (zero.offload_optimizer != "none") + (zero.offload_param != "none")
    repeated = CHECKPOINTINGS.index(fit.run.activation_checkpointing)
    # stage 1 before stage 0, which adds gradients up in 16 bits and holds all optimizer states on every rank
    return offloaded, zero.stage or 1.5, repeated, -fit.cost.tokens_per_second


def search(run: Workload, machine: Machine, conditions: Conditions = Conditions()) -> Plan:
    """Try every stage, checkpointing and offload, each with the largest micro-batch that fits.

    A larger micro-batch never takes longer, so that smaller ones need not be tried. Raises UserError where the batch
    does not divide over the ranks.
    """
    sizes = micro_batch_choices(run.global_batch_size, machine.world_size)
    found = [_fit(variant, machine, sizes, conditions) for variant in variants(run, machine.gpu)]
    fits = [one for one in found if isinstance(one, Fit)]
    misfits = [one for one in found if isinstance(one, Misfit)]
    return Plan(
        machine,
        tuple(sorted(fits, key=lambda fit: (-fit.cost.tokens_per_second, fit.memory.peak.total_bytes))),
        tuple(sorted(misfits, key=lambda misfit: misfit.short_bytes)),
    )


def as_given(run: Workload, machine: Machine, conditions: Conditions = Conditions()) -> Fit | Misfit:
    """The run's own stage, checkpointing and offload, and its micro-batch size unless that is `auto`.

    Raises UserError where the batch does not divide over the ranks.
    """
    sizes = micro_batch_choices(run.global_batch_size, machine.world_size)
    if run.micro_batch_size is None:
        return _fit(run, machine, sizes, conditions)
    if run.micro_batch_size not in sizes:
        share = run.global_batch_size // machine.world_size
        return Misfit(run, machine, f"micro-batch {run.micro_batch_size} does not divide a rank's {share} sequences")
    return _fit(run, machine, [run.micro_batch_size], conditions)


def variants(run: Workload, gpu: Gpu) -> Iterator[Workload]:
    """The run at every stage, with every checkpointing and every offload that the stage has; none to a CPU's host."""
    for stage, offloads in OFFLOADS.items():
        staged = run.zero.at_stage(stage)
        for optimizer, param in offloads[:1] if gpu.is_cpu else offloads:
            variant = run.with_zero(replace(staged, offload_optimizer=optimizer, offload_param=param))
            for checkpointing in CHECKPOINTINGS:
                yield replace(variant, activation_checkpointing=checkpointing)


def _fit(run: Workload, machine: Machine, sizes: Sequence[int], conditions: Conditions) -> Fit | Misfit:
    """The run with the largest of the micro-batch sizes, ascending, that fits; or why not even the smallest does."""
    gpu = machine.gpu
    if run.precision not in gpu.flops:
        return Misfit(run, machine, f"{run.precision} is not in the hardware of {gpu.name}")
    micro = _largest_fitting(run, machine, sizes)
    memory = _memory_on(machine, run, micro)
    if not memory.fits(gpu.memory_bytes):
        return _too_large(run, machine, micro, memory)
    short = _host_bytes(machine, memory) - round(HOST_SHARE * gpu.host_memory_bytes)
    if memory.host_bytes and short > 0:
        reason = f"{format_bytes(_host_bytes(machine, memory))} of host memory on each node, {format_bytes(short)} more"
        return Misfit(run, machine, f"{reason} than it has to spare", short)
    step = step_time(run, machine, micro, conditions.kernels, conditions.pace)
    cost = run_cost(run, machine, step, conditions.node_price, conditions.evaluated_steps)
    return Fit(run, machine, micro, memory, cost)


def _largest_fitting(run: Workload, machine: Machine, sizes: Sequence[int]) -> int:
    """Of ascending sizes; the smallest where none fits. Without accumulation a run may hold less than with it."""

    def too_large(size: int) -> bool:
        return not _memory_on(machine, run, size).fits(machine.gpu.memory_bytes)

    if not too_large(sizes[-1]):
        return sizes[-1]
    return sizes[max(0, bisect_right(sizes, 0, hi=len(sizes) - 1, key=too_large) - 1)]


def _too_large(run: Workload, machine: Machine, micro: int, memory: MemoryEstimate) -> Misfit:
    short = memory.peak.total_bytes - int(FITTING_SHARE * machine.gpu.memory_bytes)
    needed = format_bytes(memory.peak.total_bytes)
    return Misfit(
        run,
        machine,
        f"{needed} at micro-batch {micro} in {memory.peak_phase}, {format_bytes(short)} more than fits",
        short,
    )


def _host_bytes(machine: Machine, memory: MemoryEstimate) -> int:
    """Of one node."""
    return memory.host_bytes * machine.ranks_per_node // machine.world_size


@dataclass(frozen=True)
class Limits:
    """What a run may cost and take at most; None for what does not matter."""

    budget_dollars: float | None = None
    deadline_hours: float | None = None

    @property
    def are_given(self) -> bool:
        return self.budget_dollars is not None or self.deadline_hours is not None

    def overrun(self, fit: Fit) -> float:
        """The worse of dollars over budget and hours over deadline; at most 1 where both are kept."""
        ratios = [0.0]
        if self.budget_dollars is not None:
            ratios.append(_dollars(fit) / self.budget_dollars)
        if self.deadline_hours is not None:
            ratios.append(fit.cost.hours / self.deadline_hours)
        return max(ratios)

    def keep(self, fit: Fit) -> bool:
        return self.overrun(fit) <= 1

    def __str__(self) -> str:
        """The options that they are given as."""
        given = {"--budget-dollars": self.budget_dollars, "--deadline-hours": self.deadline_hours}
        return " and ".join(f"{option} {limit:.12g}" for option, limit in given.items() if limit is not None)


def best_on_each(
    run: Workload, machines: Sequence[Machine], conditions: Conditions, limits: Limits = Limits()
) -> list[Fit | Misfit]:
    """The way to run on each machine, or the nearest miss where nothing fits, in the order of the machines.

    It is the recommended one, unless that misses the limits: then the fastest, which is the cheapest of a machine too.
    """
    found: list[Fit | Misfit] = []
    for machine in machines:
        try:
            plan = search(run, machine, conditions)
        except UserError:
            reason = f"{run.global_batch_size} sequences do not divide over {machine.world_size} ranks"
            found.append(Misfit(run, machine, reason))
            continue
        best = plan.recommended()
        if best is not None and not limits.keep(best):
            best = plan.fits[0]
        found.append(best or plan.misfits[0])
    return found


def within_limits(fits: Sequence[Fit], limits: Limits) -> list[Fit]:
    """What keeps the budget and the deadline; the cheapest first where there is a deadline, else the fastest.

    Raises UserError where nothing does, with what comes closest and by how much it misses. A device without a price
    keeps no budget.
    """
    kept = [fit for fit in fits if limits.keep(fit)]
    if not kept:
        raise UserError(_nearest_miss(fits, limits))
    if limits.deadline_hours is None:
        return sorted(kept, key=lambda fit: fit.cost.run_seconds)
    return sorted(kept, key=lambda fit: (_dollars(fit), fit.cost.run_seconds))


def _dollars(fit: Fit) -> float:
    return float("inf") if fit.cost.dollars is None else fit.cost.dollars


def _nearest_miss(fits: Sequence[Fit], limits: Limits) -> str:
    if not fits:
        return f"plan: given {limits}; no such GPUs hold the run; give others, or leave the limit out to see why"
    if min(limits.overrun(fit) for fit in fits) == float("inf"):
        return f"plan: given {limits}; nothing that fits has a price; give other GPUs, or --price-per-hour"
    fit = min(fits, key=limits.overrun)
    hours, dollars = f"{fit.cost.hours:,.1f}", f"{_dollars(fit):,.2f}"
    over = []
    if limits.budget_dollars is not None and _dollars(fit) > limits.budget_dollars:
        dollars, by = _told_apart(_dollars(fit), limits.budget_dollars, 2)
        over.append(f"${by} over the budget")
    if limits.deadline_hours is not None and fit.cost.hours > limits.deadline_hours:
        hours, by = _told_apart(fit.cost.hours, limits.deadline_hours, 1)
        over.append(f"{by} hours over the deadline")
    price = "" if fit.cost.dollars is None else f" and ${dollars}"
    return (
        f"plan: given {limits}, which nothing keeps; closest is {fit.machine.world_size} x {fit.machine.gpu.name} with "
        f"{hours} hours{price}, {' and '.join(over)}; raise the limit, or train on fewer tokens"
    )


def _told_apart(value: float, limit: float, decimals: int) -> tuple[str, str]:
    """The value and what it is over the limit, with so many decimals that the latter has two digits at least."""
    over = value - limit
    decimals = max(decimals, 1 - math.floor(math.log10(over)))
    return f"{value:,.{decimals}f}", f"{over:,.{decimals}f}"
