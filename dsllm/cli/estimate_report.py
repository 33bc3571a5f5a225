"""What `dsllm estimate-memory` prints: terms with bars, which devices hold them, and what to change where none does."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from dsllm.cli.estimate import Asked
    from dsllm.launch.devices import LocalGpu
    from dsllm.plan.advice import Advice
    from dsllm.plan.hardware import Gpu
    from dsllm.plan.memory import MemoryEstimate, Terms

BAR_WIDTH, SHORT_BAR_WIDTH = 30, 12
WORTH_A_NOTE = 0.01
"""Share of a stage's peak by which it must exceed a lower stage's to be remarked upon."""


def as_document(asked: Asked, stage: int) -> dict[str, Any]:
    """The JSON of one stage; with a trace, the same by tracing and the difference of every term beside it."""
    way = asked.at_stage(stage)
    estimate = asked.predict(way)
    document = estimate.as_dict(asked.known)
    if asked.trace is not None:
        traced = asked.predict(way, asked.trace.activations)
        document["traced"] = {
            "per_gpu": {**asdict(traced.peak), "total_bytes": traced.peak.total_bytes},
            "peak_phase": traced.peak_phase,
            "phases": traced.as_dict()["phases"],
        }
    return document


def report(asked: Asked) -> None:
    """One stage in full, or several in a line each."""
    estimates = [asked.predict(asked.at_stage(stage)) for stage in asked.stages]
    typer.echo(_head(asked, estimates[0]))
    if asked.constants:
        typer.echo(f"runtime as measured on {asked.constants.device} ({asked.constants.source})")
    if len(estimates) == 1:
        _print_terms(estimates[0])
    else:
        _print_stages(estimates)
    if asked.trace is not None:
        _print_traced(asked, estimates)
    for note in _notes(asked, estimates):
        typer.echo(note)
    _print_fits(asked, estimates)


def _head(asked: Asked, estimate: MemoryEstimate) -> str:
    from dsllm.cli.networks import counted

    way, run, shape = asked.given, asked.given.run, asked.given.run.shape
    stage = f"ZeRO stage {estimate.zero_stage}, " if len(asked.stages) == 1 else ""
    unit = "GPU" if asked.device == "cuda" else "CPU rank"
    return (
        f"{counted(estimate.parameters, estimate.active_parameters)}: {shape.num_layers} layers x {shape.hidden_size}, "
        f"{shape.num_attention_heads} heads, {shape.vocab_size:,} tokens ({asked.network})"
        + (", a typical shape of that size; " if asked.parameters else "; ")
        + f"{way.micro_batch_size} x {run.sequence_length} tokens a forward, {run.precision}, "
        f"activation checkpointing {run.activation_checkpointing}; {stage}{_number(way.world_size, unit)}"
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def _print_terms(estimate: MemoryEstimate) -> None:
    """Each term of the peak with its share, then the other phases."""
    from dsllm.cli.tables import print_table
    from dsllm.plan.memory import PHASES
    from dsllm.units import format_bytes

    peak = estimate.peak
    rows = [(name, *_with_share(size, peak.total_bytes)) for name, size in _named(peak)]
    print_table([f"in {estimate.peak_phase}", "bytes", "share", "of the peak".ljust(BAR_WIDTH)], rows)
    others = [
        f"{phase} {format_bytes(estimate.phases[phase].total_bytes)}"
        for phase in PHASES
        if phase != estimate.peak_phase
    ]
    host = f"; host memory {format_bytes(estimate.host_bytes)} in all" if estimate.host_bytes else ""
    typer.echo(f"peak {format_bytes(peak.total_bytes)}, in {estimate.peak_phase}; {', '.join(others)}{host}")


def _with_share(size: int, whole: int) -> tuple[str, str, str]:
    from dsllm.units import format_bytes

    return format_bytes(size) if size else "-", f"{size / whole:.0%}", bar(size, whole)


def _print_stages(estimates: Sequence[MemoryEstimate]) -> None:
    """Each term in a row, each stage in a column: narrow enough for any terminal."""
    from dsllm.cli.tables import print_table
    from dsllm.units import GIB, MIB

    largest = max(estimate.peak.total_bytes for estimate in estimates)
    unit, digits = ("GiB", 2) if largest >= 2 * GIB else ("MiB", 1)

    def row(name: str, sizes: Iterable[int]) -> tuple[str, ...]:
        return name, *(f"{size / (GIB if unit == 'GiB' else MIB):.{digits}f}" for size in sizes)

    terms = zip(*(_named(estimate.peak) for estimate in estimates), strict=True)
    rows = [row(of_each[0][0], (size for _, size in of_each)) for of_each in terms]
    rows.append(row("peak", (estimate.peak.total_bytes for estimate in estimates)))
    rows.append(("", *(bar(estimate.peak.total_bytes, largest, SHORT_BAR_WIDTH) for estimate in estimates)))
    rows.append(("in", *(estimate.peak_phase for estimate in estimates)))
    if any(estimate.host_bytes for estimate in estimates):
        rows.append(row("host memory", (estimate.host_bytes for estimate in estimates)))
    print_table([unit, *(f"ZeRO stage {estimate.zero_stage}" for estimate in estimates)], rows)


def bar(size: int, whole: int, width: int = BAR_WIDTH) -> str:
    """Filled in proportion, and as wide as any other; in ASCII where the screen may not have blocks."""
    encoding = (getattr(sys.stdout, "encoding", "") or "").lower()
    full, empty = "█░" if sys.stdout.isatty() and encoding.startswith("utf") else "#."
    filled = round(width * size / whole)
    return full * filled + empty * (width - filled)


def _named(terms: Terms) -> list[tuple[str, int]]:
    return [(name.removesuffix("_bytes"), size) for name, size in asdict(terms).items()]


def _number(count: int, unit: str) -> str:
    return f"{count} {unit}" + ("s" if count > 1 else "")


MOMENTS = {
    "saved_bytes": "activations saved for backward",
    "loss_forward_bytes": "loss in forward",
    "loss_backward_bytes": "loss in backward",
    "block_backward_bytes": "last block in backward",
    "first_block_bytes": "first block in backward",
}


def _print_traced(asked: Asked, estimates: Sequence[MemoryEstimate]) -> None:
    """Arithmetic beside trace: what a micro-batch leaves, and the peak of each stage with it."""
    from dsllm.cli.tables import print_table
    from dsllm.units import format_bytes

    rows = [
        (name, format_bytes(calculated), format_bytes(traced), _difference(calculated, traced))
        for name, calculated, traced in _compared(asked, estimates)
    ]
    print_table(["of a micro-batch, and in all", "arithmetic", "traced", "difference"], rows)


def _compared(asked: Asked, estimates: Sequence[MemoryEstimate]) -> Iterator[tuple[str, int, int]]:
    """Name, and bytes by arithmetic and by trace."""
    from dsllm.plan.activations import activations

    assert asked.trace is not None
    way, traced = asked.given, asdict(asked.trace.activations)
    for term, calculated in asdict(activations(way.run, way.micro_batch_size, asked.device)).items():
        yield MOMENTS[term], calculated, traced[term]
    for estimate in estimates:
        peak = asked.predict(asked.at_stage(estimate.zero_stage), asked.trace.activations).peak
        yield f"peak at stage {estimate.zero_stage}", estimate.peak.total_bytes, peak.total_bytes


def _difference(calculated: int, traced: int) -> str:
    return f"{calculated / traced - 1:+.1%}" if traced else "-" if calculated == traced else "not traced"


# --- notes ------------------------------------------------------------------------------------------------------------


def _notes(asked: Asked, estimates: Sequence[MemoryEstimate]) -> Iterator[str]:
    """Where a stage takes more than a lower one, by how much and in which terms."""
    for estimate in estimates:
        lower = [asked.predict(asked.at_stage(stage)) for stage in range(estimate.zero_stage)]
        least = min(lower, key=lambda other: other.peak.total_bytes, default=None)
        if least is None:
            continue
        more = estimate.peak.total_bytes - least.peak.total_bytes
        if more > WORTH_A_NOTE * estimate.peak.total_bytes:
            yield _note(asked, estimate, least, more)


def _note(asked: Asked, higher: MemoryEstimate, lower: MemoryEstimate, more: int) -> str:
    """Terms are compared at the moment that is the higher stage's peak."""
    from dsllm.units import format_bytes

    then = dict(_named(lower.phases[higher.peak_phase]))
    grown = {name: size - then[name] for name, size in _named(higher.peak) if size > then[name]}
    largest = sorted(grown, key=lambda name: -grown[name])[:2]
    terms = [f"{name} +{format_bytes(grown[name])}{_reason(asked, higher, name)}" for name in largest]
    return (
        f"note: stage {higher.zero_stage} takes {format_bytes(more)} more than stage {lower.zero_stage} on "
        f"{_number(higher.world_size, 'rank')}; at its peak, in {higher.peak_phase}: {', '.join(terms)}"
    )


def _reason(asked: Asked, higher: MemoryEstimate, term: str) -> str:
    """Whose buffers they are, as dsllm/plan/moments.py has them."""
    run = asked.at_stage(higher.zero_stage).run
    if term == "gradients" and run.runs_bf16_optimizer:
        return " (DeepSpeed's BF16_Optimizer keeps all of them in fp32, beside those of backward)"
    if term == "gradients" and run.zero.stage == 3:
        return f" (DeepSpeed's flat {run.accumulation_precision} buffer of its partition, which lasts the whole step)"
    if term == "gradients":
        return f" (they add up in {run.accumulation_precision})"
    if term == "optimizer" and run.precision == "fp32":
        return " (DeepSpeed's master copy of what is in fp32 already)"
    if term == "communication":
        return " (DeepSpeed's buckets" + (" and gathered parameters)" if run.zero.stage == 3 else ")")
    return " (DeepSpeed's copies)" if term == "temporaries" else ""


# --- what holds it ----------------------------------------------------------------------------------------------------


def _print_fits(asked: Asked, estimates: Sequence[MemoryEstimate]) -> None:
    """The devices that hold it and what they have left, this machine's own, and advice where none does."""
    from dsllm.launch.devices import local_gpus

    on_cpu = asked.device == "cpu"
    considered = (asked.gpu,) if asked.gpu else tuple(gpu for gpu in asked.known if gpu.is_cpu == on_cpu)
    able = [gpu for gpu in considered if asked.given.run.precision in gpu.flops]
    if asked.gpu and not able:
        typer.echo(_without_arithmetic(asked.gpu, asked))
    for estimate in estimates:
        typer.echo(_fit(estimate, considered, in_full=len(estimates) == 1))
    if on_cpu:
        typer.echo(_fit_of_this_host(estimates))
        return
    for line in _own(local_gpus(), asked, estimates):
        typer.echo(line)
    if able and not any(estimate.fits_on(gpu) for estimate in estimates for gpu in able):
        for line in _advice(asked, _largest(able)):
            typer.echo(line)


def _largest(devices: Sequence[Gpu]) -> Gpu:
    return max(devices, key=lambda gpu: gpu.memory_bytes)


def _without_arithmetic(gpu: Gpu, asked: Asked) -> str:
    others = " or ".join(other for other in ("bf16", "fp16", "fp32") if other in gpu.flops)
    remedy = "set training.precision to" if asked.given.has_batch else "give a spec with training.precision"
    return f"note: {gpu.name} has no arithmetic in {asked.given.run.precision}; {remedy} {others}"


def _fit(estimate: MemoryEstimate, considered: Sequence[Gpu], in_full: bool) -> str:
    """`stage 3: 20.11 GiB on each GPU; fits a100-40gb (19.29 GiB left), ...`; of several stages without the rests."""
    from dsllm.units import format_bytes

    needed = estimate.peak.total_bytes
    unit = "GPU" if estimate.device == "cuda" else "CPU rank"
    start = f"stage {estimate.zero_stage}: {format_bytes(needed)} on each {unit}; "
    fitting = [gpu for gpu in considered if estimate.fits_on(gpu)]
    able = [gpu for gpu in considered if estimate.precision in gpu.flops]
    if not able:
        return f"{start}cannot run on {_largest(considered).name}, which has no arithmetic in {estimate.precision}"
    if not fitting:
        largest = _largest(able)
        name = largest.name if len(considered) == 1 else f"any known GPU, the largest being {largest.name}"
        return f"{start}does not fit {name}: {_missing(estimate, largest.memory_bytes)}"
    first, *others = (
        f"{gpu.name} ({format_bytes(gpu.memory_bytes - needed)} left)" if in_full or gpu is fitting[0] else gpu.name
        for gpu in fitting
    )
    return f"{start}fits {', '.join([first, *others])}"


def _missing(estimate: MemoryEstimate, memory_bytes: int) -> str:
    """`9.81 GiB more than 95% of its 14.56 GiB`."""
    from dsllm.plan.memory import FITTING_SHARE
    from dsllm.units import format_bytes

    over = estimate.peak.total_bytes - int(FITTING_SHARE * memory_bytes)
    return f"{format_bytes(over)} more than {FITTING_SHARE:.0%} of its {format_bytes(memory_bytes)}"


def _own(own: Sequence[LocalGpu], asked: Asked, estimates: Sequence[MemoryEstimate]) -> Iterator[str]:
    """This machine's GPUs as they are now; those of a kind in one line, by the fullest."""
    from dsllm.plan.hardware import gpu_of_device
    from dsllm.units import format_bytes

    for name in dict.fromkeys(gpu.name for gpu in own):
        alike = [gpu for gpu in own if gpu.name == name]
        free = min(gpu.free_bytes for gpu in alike)
        stages = [str(estimate.zero_stage) for estimate in estimates if estimate.fits(free)]
        of_each = " on the fullest" if len(alike) > 1 else ""
        verdict = f"holds stage {', '.join(stages)}" if stages else f"holds none: {_missing(estimates[-1], free)}"
        if len(estimates) == 1:
            left = free - estimates[0].peak.total_bytes
            verdict = f"fits, {format_bytes(left)} left" if stages else f"does not fit: {_missing(estimates[0], free)}"
        kind = gpu_of_device(name, asked.known)
        if kind and asked.given.run.precision not in kind.flops:
            verdict = f"cannot run it, without arithmetic in {asked.given.run.precision}"
        yield f"this machine: {len(alike)} x {name}, {format_bytes(free)} free now{of_each}: {verdict}"


def _fit_of_this_host(estimates: Sequence[MemoryEstimate]) -> str:
    """On the CPU all ranks share one memory, when they run here."""
    import os

    from dsllm.units import format_bytes

    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needs = [estimate.peak.total_bytes * estimate.world_size for estimate in estimates]
    verdicts = [
        f"stage {estimate.zero_stage} {format_bytes(need)}" + ("" if need <= memory_bytes else ", which is too much")
        for estimate, need in zip(estimates, needs, strict=True)
    ]
    return f"all ranks on this machine, which has {format_bytes(memory_bytes)}: {'; '.join(verdicts)}"


# --- advice -----------------------------------------------------------------------------------------------------------


def _advice(asked: Asked, target: Gpu) -> Iterator[str]:
    """What to type for it to fit, from the run's own stage or the only one that was asked for.

    More GPUs are not everybody's to have: where they are the advice, what does without them follows.
    """
    from dsllm.plan.advice import advise

    way = asked.at_stage(asked.stages[0]) if len(asked.stages) == 1 else asked.given
    advice = advise(way, target, asked.predict)
    yield _advised(asked, advice, target, "to fit")
    if advice.world_size is not None:
        without = advise(way, target, asked.predict, more_ranks=False)
        yield _advised(asked, without, target, f"on {_number(way.world_size, 'GPU')}, to fit")


def _advised(asked: Asked, advice: Advice, target: Gpu, aim: str) -> str:
    from dsllm.units import format_bytes

    needed = format_bytes(advice.estimate.peak.total_bytes)
    host = f", and {format_bytes(advice.estimate.host_bytes)} of host memory" if advice.estimate.host_bytes else ""
    typed = _typed(asked, advice)
    if advice.fits:
        return f"{aim} {target.name}: {typed} takes {needed}{host}"
    missing = _missing(advice.estimate, target.memory_bytes)
    return f"{aim} {target.name}: nothing does; the least is {typed} with {needed}{host}, {missing}"


def _settings(asked: Asked, advice: Advice) -> dict[str, str | int]:
    """What changes, also of the spec itself: --zero has dropped from it what that stage does not have."""
    from dsllm.plan.way import changed_settings

    of_the_spec = changed_settings(asked.given, advice.changed) if asked.given.has_batch else {}
    return {**advice.settings, **of_the_spec}


def _typed(asked: Asked, advice: Advice) -> str:
    """The options that say it; fields that no option sets beside --params are named as those of a spec."""
    options = {} if asked.given.has_batch else {"zero.stage": "--zero", "batch.micro_batch_size": "--micro-batch-size"}
    settings = _settings(asked, advice)
    words = [f"{options[name]} {value}" for name, value in settings.items() if name in options]
    others = [f"{name}={value}" for name, value in settings.items() if name not in options]
    if asked.given.has_batch:
        words += [f"--set {setting}" for setting in others]
    if advice.world_size is not None:
        words.append(f"--gpus {advice.world_size}")
    if others and not asked.given.has_batch:
        words.append(("and " if words else "") + f"a spec with {', '.join(others)}")
    return " ".join(words) or "the run as it is"
