"""What `dsllm plan` prints: tables for people, JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from dsllm.plan.cost import Machine
    from dsllm.plan.hardware import Gpu
    from dsllm.plan.pace import Calibration
    from dsllm.plan.search import Conditions, Fit, Limits, Misfit, Plan
    from dsllm.plan.workload import Workload

SHOWN_FITS, SHOWN_MACHINES = 10, 30
PRECISIONS = ("bf16", "fp16", "fp32")
"""Of a run; the likeliest to be wanted first."""
COLUMNS = ["", "ZeRO", "checkpointing", "offload", "micro", "accum", "GiB", "step s", "tokens/s", "MFU", "hours", "$"]


# --- one machine ------------------------------------------------------------------------------------------------------


def report_one(
    run: Workload,
    machine: Machine,
    conditions: Conditions,
    calibration: Calibration | None,
    checkpoints: int | None,
    as_json: bool,
) -> None:
    """Every way to run on one machine; `checkpoints` that the spec keeps, None where there is no spec."""
    from dsllm.plan.search import as_given, search

    found = search(run, machine, conditions)
    given = None if checkpoints is None else as_given(run, machine, conditions)
    if as_json:
        document = {
            **_facts(run, calibration),
            "machine": _machine_facts(machine),
            "as_given": given and _row_facts(given, run),
            "fits": [_row_facts(fit, run) for fit in found.fits],
            "misfits": [_row_facts(misfit, run) for misfit in found.misfits],
        }
        typer.echo(json.dumps(document, indent=2))
        return
    _print_head(run, calibration)
    typer.echo(_machine_sentence(machine, conditions))
    _print_fits(found, given)
    _print_misfits(found.misfits, has_fits=bool(found.fits))
    _print_advice(run, found, given, checkpoints or 1)


def _print_fits(found: Plan, given: Fit | Misfit | None) -> None:
    from dsllm.cli.tables import print_table
    from dsllm.plan.search import Fit, Misfit

    rows = [_cells(str(place), fit) for place, fit in enumerate(found.fits[:SHOWN_FITS], start=1)]
    if isinstance(given, Fit):
        rows.append(_cells("as the spec says", given))
    if rows:
        print_table(COLUMNS, rows)
    if isinstance(given, Misfit):
        typer.echo(f"as the spec says ({_way(given.run)}): does not fit: {given.reason}")
    if len(found.fits) > SHOWN_FITS:
        typer.echo(f"{len(found.fits) - SHOWN_FITS} slower ways fit too; --json lists them")


def _print_misfits(misfits: Sequence[Misfit], has_fits: bool) -> None:
    """Why the rest does not fit; ways that fail for one reason share a line, and where all do, need no names."""
    reasons: dict[str, list[str]] = {}
    for misfit in misfits:
        reasons.setdefault(misfit.reason, []).append(_way(misfit.run))
    if reasons:
        typer.echo("does not fit:")
    for reason, ways in reasons.items():
        named = ways if len(ways) == 1 or len(reasons) > 1 or has_fits else [f"any of the {len(ways)} ways"]
        typer.echo(f"  {'; '.join(named)}: {reason}")


def _print_advice(run: Workload, found: Plan, given: Fit | Misfit | None, checkpoints: int) -> None:
    from dsllm.plan.cost import checkpoint_bytes
    from dsllm.plan.search import Fit
    from dsllm.units import format_bytes

    best = found.recommended(given)
    if best is None:
        typer.echo(f"nothing fits; take {_way_out(run, found.machine.gpu, has_spec=given is not None)}")
        return
    each = checkpoint_bytes(best.run)
    typer.echo(f"disk: {format_bytes(each)} a checkpoint, {format_bytes(each * checkpoints)} for {checkpoints}")
    if best is given:
        typer.echo("take it as the spec says: nothing is faster by more than is sure")
        return
    rates = best.cost.tokens_per_second, given.cost.tokens_per_second if isinstance(given, Fit) else 0.0
    gain = f" ({rates[0] / rates[1] - 1:+.0%} tokens/s)" if rates[1] else ""
    typer.echo(f"take{gain}: {_flags(run, best)}")


def _way_out(run: Workload, gpu: Gpu, has_spec: bool) -> str:
    """What to change where nothing fits: the precision, if the GPU does not have it, else the GPUs."""
    if run.precision in gpu.flops:
        return "more or larger GPUs: without --gpu all are compared"
    known = [precision for precision in PRECISIONS if precision in gpu.flops]
    another = f"a GPU that has {run.precision}, or another precision, of which {gpu.name} has {' and '.join(known)}:"
    if not has_spec:
        return f"{another} training.precision of a SPEC"
    settings = {"training.precision": known[0]}
    if run.gradient_accumulation_precision not in ("auto", "fp32", known[0]):
        settings["training.gradient_accumulation_precision"] = "auto"
    return f"{another} {_as_flags(settings)}"


def _flags(run: Workload, fit: Fit) -> str:
    return _as_flags(settings_of(run, fit))


def _as_flags(settings: Mapping[str, str | int]) -> str:
    return " ".join(f"--set {name}={value}" for name, value in settings.items())


def settings_of(run: Workload, fit: Fit) -> dict[str, str | int]:
    """Fields of the spec that differ between the run as given and the way found; `auto` comes to the same size."""
    from dsllm.plan.way import Way, changed_settings

    world_size = fit.machine.world_size
    given = Way(run, world_size, run.micro_batch_size or fit.micro_batch_size)
    return changed_settings(given, Way(fit.run, world_size, fit.micro_batch_size))


# --- several machines -------------------------------------------------------------------------------------------------


def report_comparison(
    run: Workload,
    machines: Sequence[Machine],
    conditions: Conditions,
    calibration: Calibration | None,
    limits: Limits,
    as_json: bool,
) -> None:
    """The way to run on each machine, in the order of the machines, or of what the limits ask for."""
    from dsllm.plan.search import Fit, Misfit, best_on_each, within_limits

    found = best_on_each(run, machines, conditions, limits)
    misfits = [one for one in found if isinstance(one, Misfit)]
    fits = [one for one in found if isinstance(one, Fit)]
    if limits.are_given:
        fits = within_limits(fits, limits)
    if as_json:
        document = {
            **_facts(run, calibration),
            "fits": [{"machine": _machine_facts(fit.machine), **_row_facts(fit, run)} for fit in fits],
            "misfits": [{"machine": _machine_facts(one.machine), **_row_facts(one, run)} for one in misfits],
        }
        typer.echo(json.dumps(document, indent=2))
        return
    _print_head(run, calibration)
    _print_machines(fits)
    _print_machine_misfits(misfits)
    if limits.are_given:
        order = "fastest within the budget" if limits.deadline_hours is None else "cheapest within the deadline"
        flags = _flags(run, fits[0])
        typer.echo(f"{order}: {_name(fits[0].machine)}{' with ' + flags if flags else ''}")


def _print_machines(fits: Sequence[Fit]) -> None:
    from dsllm.cli.tables import print_table

    if fits:
        print_table(["GPUs", *COLUMNS[1:]], [_cells(_name(fit.machine), fit) for fit in fits[:SHOWN_MACHINES]])
    if len(fits) > SHOWN_MACHINES:
        typer.echo(f"{len(fits) - SHOWN_MACHINES} machines more; --json lists them")


def _print_machine_misfits(misfits: Sequence[Misfit]) -> None:
    """Why machines are not in the table, those of one reason together."""
    reasons: dict[str, dict[str, list[int]]] = {}
    for misfit in misfits:
        sizes = reasons.setdefault(misfit.reason, {}).setdefault(misfit.machine.gpu.name, [])
        sizes.append(misfit.machine.world_size)
    if reasons:
        typer.echo("does not fit:")
    for reason, machines in reasons.items():
        alike: dict[str, list[str]] = {}
        for name, sizes in machines.items():
            alike.setdefault("/".join(map(str, sizes)), []).append(name)
        groups = [f"{sizes} x {', '.join(names)}" for sizes, names in alike.items()]
        typer.echo(f"  {'; '.join(groups)}: {reason}")


# --- words and numbers ------------------------------------------------------------------------------------------------


def _print_head(run: Workload, calibration: Calibration | None) -> None:
    from dsllm.cli.networks import counted
    from dsllm.plan.cost import compute_optimal_tokens, petaflop_s_days
    from dsllm.units import format_count

    optimal = compute_optimal_tokens(run)
    typer.echo(
        f"{counted(run.shape.parameters, run.shape.active_parameters)} on {format_count(run.tokens)} tokens, "
        f"{run.tokens / optimal:.2f} times the compute-optimal {format_count(optimal)}; "
        f"{run.train_steps:,} steps of {run.tokens_per_step:,} tokens; {petaflop_s_days(run):.3g} petaFLOP/s-days"
    )
    if calibration:
        typer.echo(
            f"calibrated: {calibration.measured_seconds:.3g} s a step measured on {_name(calibration.machine)} over "
            f"{calibration.num_steps} steps, {calibration.predicted_seconds:.3g} s assumed; "
            f"every time below is multiplied by {calibration.pace:.3g}; on another GPU it is a guess"
        )


def _machine_sentence(machine: Machine, conditions: Conditions) -> str:
    from dsllm.plan.cost import price_per_hour

    price = price_per_hour(machine, conditions.node_price)
    nodes = f", {machine.num_nodes} nodes" if machine.num_nodes > 1 else ""
    return f"{_name(machine)}{nodes}, " + ("no known price" if price is None else f"${price:,.2f} an hour")


def _name(machine: Machine) -> str:
    return f"{machine.world_size} x {machine.gpu.name}"


def _way(run: Workload) -> str:
    """`stage 3, checkpointing full, optimizer on cpu`."""
    parts = [f"stage {run.zero.stage}", f"checkpointing {run.activation_checkpointing}"]
    return ", ".join(parts + ([f"{_offload(run)} on the host"] if _offload(run) != "none" else []))


def _offload(run: Workload) -> str:
    parts = [("optimizer", run.zero.offload_optimizer), ("param", run.zero.offload_param)]
    return "+".join(name for name, device in parts if device != "none") or "none"


def _cells(first: str, fit: Fit) -> tuple[str, ...]:
    from dsllm.units import GIB

    cost = fit.cost
    return (
        first,
        str(fit.run.zero.stage),
        fit.run.activation_checkpointing,
        _offload(fit.run),
        str(fit.micro_batch_size),
        str(fit.accumulation_steps),
        f"{fit.memory.peak.total_bytes / GIB:.1f}",
        f"{cost.step.total_seconds:.3g}",
        f"{cost.tokens_per_second:,.0f}",
        f"{cost.model_flops_utilization:.0%}",
        f"{cost.hours:,.1f}",
        "?" if cost.dollars is None else f"{cost.dollars:,.0f}" if cost.dollars >= 100 else f"{cost.dollars:.2f}",
    )


def _facts(run: Workload, calibration: Calibration | None) -> dict[str, Any]:
    """What is trained, for scripts; bytes, tokens and seconds are whole numbers."""
    from dsllm.plan.cost import compute_optimal_tokens, petaflop_s_days

    facts: dict[str, Any] = {
        "parameters": run.shape.parameters,
        "active_parameters": run.shape.active_parameters,
        "tokens": run.tokens,
        "compute_optimal_tokens": compute_optimal_tokens(run),
        "train_steps": run.train_steps,
        "tokens_per_step": run.tokens_per_step,
        "petaflop_s_days": petaflop_s_days(run),
    }
    if calibration:
        facts["calibration"] = {
            "machine": _machine_facts(calibration.machine),
            "measured_microseconds": round(1e6 * calibration.measured_seconds),
            "predicted_microseconds": round(1e6 * calibration.predicted_seconds),
            "steps": calibration.num_steps,
        }
    return facts


def _machine_facts(machine: Machine) -> dict[str, Any]:
    return {"gpu": machine.gpu.name, "gpus": machine.world_size, "nodes": machine.num_nodes}


def _row_facts(one: Fit | Misfit, given: Workload) -> dict[str, Any]:
    from dsllm.plan.cost import checkpoint_bytes
    from dsllm.plan.search import Misfit

    zero = one.run.zero
    way = {
        "zero_stage": zero.stage,
        "activation_checkpointing": one.run.activation_checkpointing,
        "offload_optimizer": zero.offload_optimizer,
        "offload_param": zero.offload_param,
    }
    if isinstance(one, Misfit):
        return {**way, "reason": one.reason, "short_bytes": one.short_bytes}
    step = one.cost.step
    return {
        **way,
        "micro_batch_size": one.micro_batch_size,
        "gradient_accumulation_steps": one.accumulation_steps,
        "peak_bytes": one.memory.peak.total_bytes,
        "host_bytes": one.memory.host_bytes,
        "checkpoint_bytes": checkpoint_bytes(one.run),
        "step_microseconds": round(1e6 * step.total_seconds),
        "step_terms_microseconds": {
            name: round(1e6 * step.pace * getattr(step, f"{name}_seconds"))
            for name in ("matmul", "memory", "host", "communication", "optimizer", "offload")
        },
        "tokens_per_second": round(one.cost.tokens_per_second),
        "model_flops_utilization": one.cost.model_flops_utilization,
        "run_seconds": round(one.cost.run_seconds),
        "dollars": one.cost.dollars,
        "set": settings_of(given, one),
    }
