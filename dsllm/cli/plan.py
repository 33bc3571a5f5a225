"""The command that plans: what fits given hardware, how long it takes, what it costs; or which hardware to rent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dsllm.cli.hardware import Hardware, known_devices
from dsllm.cli.networks import read_spec, workload_of
from dsllm.cli.options import AsJson, Overrides
from dsllm.cli.plain import PlainCommand, parameter_count, whole_number

if TYPE_CHECKING:
    from dsllm.plan.hardware import Gpu
    from dsllm.plan.pace import Calibration
    from dsllm.plan.work import Kernels
    from dsllm.plan.workload import Workload
    from dsllm.spec.sections import Spec

app = typer.Typer(rich_markup_mode=None)

DEFAULT_GPUS, GPUS_UNDER_A_LIMIT = "8", "1-1024"


@app.command(cls=PlainCommand, epilog="Example: dsllm plan 1b --gpu a100-40gb --gpus 8 --price-per-hour 8.80")
def plan(
    spec: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Argument(
            metavar="SPEC", help="A spec file or the name of a preset; or give --params.", show_default=False
        ),
    ] = None,
    parameters: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--params", metavar="N", help="Parameters, as 1e9 or 350M: a typical shape on 20 tokens a parameter."
        ),
    ] = None,
    gpu: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--gpu", metavar="NAME", help="GPU, as a100-40gb; every known one when absent.", show_default=False
        ),
    ] = None,
    gpus: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--gpus",
            metavar="N",
            help="Ranks in all: a number, a list as 8,16, or a range as 1-4096 for the powers of two in it; 8 when "
            "absent, 1-1024 with a budget or deadline.",
            show_default=False,
        ),
    ] = None,
    gpus_per_node: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--gpus-per-node", metavar="N", help="GPUs of one machine; the catalogue's when absent.", show_default=False
        ),
    ] = None,
    price_per_hour: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--price-per-hour", metavar="X", help="Dollars for one machine with all its GPUs.", show_default=False
        ),
    ] = None,
    budget_dollars: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--budget-dollars", metavar="X", help="Only what costs no more.", show_default=False),
    ] = None,
    deadline_hours: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--deadline-hours", metavar="X", help="Only what takes no longer, the cheapest first.", show_default=False
        ),
    ] = None,
    hardware: Hardware = None,
    calibrate_from: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--calibrate-from",
            metavar="RUN",
            help="A run whose measured steps replace assumptions.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Search stages, micro-batches, checkpointing and offload: what fits, how long it takes, what it costs.

    Without --gpu, or with several numbers of GPUs, a budget or a deadline: which GPUs to rent.
    """
    from dsllm.cli.plan_report import report_comparison, report_one
    from dsllm.plan.cost import Machine
    from dsllm.plan.search import Conditions, Limits

    price = _positive("--price-per-hour", price_per_hour)
    limits = Limits(_positive("--budget-dollars", budget_dollars), _positive("--deadline-hours", deadline_hours))
    node = None if gpus_per_node is None else whole_number("--gpus-per-node", gpus_per_node, "GPUs in a machine")
    known = _catalogue(hardware)
    run, kernels, evaluated, checkpoints = _run(spec, parameters, overrides or [])
    calibration = None if calibrate_from is None else _calibration(Path(calibrate_from), gpu, known, node)
    conditions = Conditions(kernels, calibration.pace if calibration else 1.0, price, evaluated)
    unless_given = GPUS_UNDER_A_LIMIT if limits.are_given else DEFAULT_GPUS
    counts = rank_counts(unless_given if gpus is None else gpus)
    machines = [Machine.of(one, count, node) for one in _devices(gpu, known) for count in counts]
    if len(machines) == 1 and not limits.are_given:
        report_one(run, machines[0], conditions, calibration, checkpoints, as_json)
    else:
        report_comparison(run, machines, conditions, calibration, limits, as_json)


# --- what is given ----------------------------------------------------------------------------------------------------


def rank_counts(text: str) -> list[int]:
    """`8`, `8,16`, or `1-4096`: the powers of two in that range. Raises UserError for anything else."""
    from dsllm.errors import UserError

    counts: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            low = high = 0
        powers = [2**power for power in range(25) if low <= 2**power <= high]
        found = powers if dash else [low]
        if low < 1 or not found:
            raise UserError(f"--gpus: given '{text}'; must be a number from 1, a list as 8,16, or a range as 1-4096")
        counts |= set(found)
    return sorted(counts)


def _positive(option: str, text: str | None) -> float | None:
    """A number above 0, None where the option is absent. Raises UserError, naming the option."""
    from dsllm.errors import UserError

    try:
        number = None if text is None else float(text)
    except ValueError:
        number = 0.0
    if number is not None and not 0 < number < float("inf"):
        raise UserError(f"{option}: given '{text}'; must be a number above 0; for example {option} 10")
    return number


def _catalogue(hardware: str | None) -> tuple[Gpu, ...]:
    """The known devices and the user's own, with what was calibrated on this machine."""
    from dsllm.cli.calibrate import known_constants
    from dsllm.plan.calibration import with_constants

    calibrated = known_constants()
    return tuple(with_constants(gpu, calibrated) for gpu in known_devices(hardware))


def _devices(gpu: str | None, known: Sequence[Gpu]) -> list[Gpu]:
    from dsllm.plan.hardware import gpu_named

    return [one for one in known if not one.is_cpu] if gpu is None else [gpu_named(gpu, known)]


def _run(spec: str | None, parameters: str | None, overrides: list[str]) -> tuple[Workload, Kernels, float, int | None]:
    """The run, its kernels, what it evaluates in global batches, and the checkpoints that its spec keeps."""
    from dsllm.errors import UserError

    if (parameters is None) == (spec is None):
        raise UserError("plan: give one of SPEC and --params; for example dsllm plan 1b, or dsllm plan --params 1e9")
    if spec is None:
        from dsllm.plan.typical import typical_run

        if overrides:
            raise UserError("--set: nothing to override without SPEC; give SPEC, or remove --set")
        assert parameters is not None
        return typical_run(parameter_count(parameters)), "eager", 0.0, None
    loaded = read_spec(spec, overrides)
    sets = len(loaded.data.sources if loaded.data.validation_fraction else ()) + len(loaded.data.validation_sources)
    evaluated = sets * loaded.evaluation.batches * (2 + loaded.train_steps / loaded.evaluation.interval)
    return workload_of(loaded), _kernels(loaded), evaluated, loaded.checkpoint.keep_last


def _kernels(spec: Spec) -> Kernels:
    return "fused" if spec.training.compile else "eager"


def _calibration(folder: Path, gpu: str | None, known: Sequence[Gpu], node: int | None) -> Calibration:
    """What the measured steps of a run folder say of the assumptions; its machine's nodes hold `node` GPUs."""
    from dsllm.plan.batch import resolve_batch
    from dsllm.plan.cost import Machine
    from dsllm.plan.pace import calibrate, measured_step_seconds

    metrics = folder / "metrics.jsonl"
    records = _records(metrics)
    passport, config = _object(folder / "passport.json"), _object(folder / "ds_config.json")
    world_size = _whole(passport, "world_size", folder / "passport.json")
    micro_batch_size = _whole(config, "train_micro_batch_size_per_gpu", folder / "ds_config.json")
    spec = read_spec(str(folder / "spec.yaml"))
    micro_batch_size = resolve_batch(spec.batch, world_size, micro_batch_size).micro_batch_size
    device = _measured_device(folder, str(passport.get("device") or ""), gpu, known)
    machine = Machine.of(device, world_size, node)
    measured = measured_step_seconds(records, str(metrics))
    return calibrate(workload_of(spec), machine, micro_batch_size, _kernels(spec), measured)


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a run's steps. Raises UserError for a line that is none."""
    from dsllm.errors import UserError

    records = []
    for number, line in enumerate(_read(path).splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break  # a killed run leaves half a line
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(
                f"--calibrate-from: {path}: line {number} is not the record of a step; remove it, or give another run"
            )
        records.append(record)
    return records


def _object(path: Path) -> dict[str, Any]:
    """A JSON file of a run. Raises UserError for one that holds anything else than entries."""
    from dsllm.errors import UserError
    from dsllm.spec.yaml_text import parse_json

    document = parse_json(_read(path), str(path))
    if not isinstance(document, dict):
        raise UserError(f"--calibrate-from: {path}: holds no entries; give a folder that dsllm trained in")
    return document


def _whole(document: dict[str, Any], key: str, path: Path) -> int:
    """A count among a run's entries. Raises UserError where there is none."""
    from dsllm.errors import UserError

    found = document.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        given = f"given {found!r}" if key in document else "missing"
        raise UserError(
            f"--calibrate-from: {path}: {key}: {given}; must be a whole number from 1; "
            "give a folder that dsllm trained in"
        )
    return found


def _read(path: Path) -> str:
    from dsllm.errors import UserError

    try:
        return path.read_text(encoding="utf-8", errors="replace")  # what is no text is no JSON either
    except OSError as error:
        raise UserError(f"--calibrate-from: {path}: {error.strerror}; give a run folder, as runs/quickstart") from error


def _measured_device(folder: Path, device: str, gpu: str | None, known: Sequence[Gpu]) -> Gpu:
    """What a run was measured on, by its passport where that names a device; else what --gpu says."""
    from dsllm.errors import UserError
    from dsllm.plan.hardware import gpu_named, gpu_of_device

    found = gpu_of_device(device, known) if device else None
    if found is None and gpu is None:
        raise UserError(
            f"--calibrate-from: {folder} ran on {device or 'a device that its passport does not name'}, which is not "
            "in the catalogue; name its like with --gpu, or describe it in a --hardware file"
        )
    return found or gpu_named(str(gpu), known)
