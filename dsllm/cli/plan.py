"""Commands that predict: estimate-memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsllm.cli.options import AsJson, Overrides

if TYPE_CHECKING:
    from dsllm.plan.memory import MemoryEstimate
    from dsllm.spec.sections import Spec

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog="Example: dsllm estimate-memory --spec 1b --gpus 8    or: --params 1e9 --zero 3")
def estimate_memory(
    parameters: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option("--params", metavar="N", help="Parameters, as 1e9 or 350M; a typical shape is assumed."),
    ] = None,
    spec: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--spec", metavar="SPEC", help="A spec file or the name of a preset: exact shapes."),
    ] = None,
    zero: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--zero", min=0, max=3, help="ZeRO stage; all of them when absent.", show_default=False),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Ranks in all.")] = 1,
    micro_batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--micro-batch-size",
            min=1,
            help="Sequences per GPU per forward; the spec's own when absent, or 1 where it says auto.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Predict the memory of each GPU, term by term, and which GPUs it fits."""
    from dsllm.plan import memory
    from dsllm.plan.search import at_stage

    run, count = _run(parameters, spec, overrides or [])
    own = run.batch.micro_batch_size
    micro = micro_batch_size or (1 if own == "auto" else own)
    stages = range(4) if zero is None else [zero]
    estimates = [memory.estimate_memory(at_stage(run, stage), gpus, micro, count) for stage in stages]
    if as_json:
        documents = [estimate.as_dict() for estimate in estimates]
        typer.echo(json.dumps(documents if zero is None else documents[0], indent=2))
    else:
        _print(run, estimates, micro)


def _run(parameters: str | None, spec: str | None, overrides: list[str]) -> tuple[Spec, int | None]:
    """The run to predict, and the number of parameters where only that is given."""
    from dsllm.errors import UserError
    from dsllm.plan.typical import typical_spec
    from dsllm.spec.load import load_spec

    if (parameters is None) == (spec is None):
        raise UserError("estimate-memory: give one of --params and --spec; for example --params 1e9, or --spec 1b")
    if spec is not None:
        return load_spec(spec, overrides), None
    if overrides:
        raise UserError("--set: nothing to override without --spec; give --spec, or remove --set")
    assert parameters is not None
    count = _count(parameters)
    return typical_spec(count), count


def _count(text: str) -> int:
    """`1e9`, `350M` or `1.3B` as a number of parameters."""
    from dsllm.errors import UserError

    scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}.get(text[-1:].lower(), 1.0)
    try:
        count = float(text if scale == 1.0 else text[:-1]) * scale
        if not 1e4 <= count <= 1e13:
            raise ValueError
    except ValueError:
        raise UserError(f"--params: given '{text}'; must be a number from 1e4 to 1e13, as 1e9, 350M or 1.3B") from None
    return round(count)


def _print(run: Spec, estimates: list[MemoryEstimate], micro_batch_size: int) -> None:
    from dsllm.cli.tables import print_table
    from dsllm.plan.model_shape import model_shape
    from dsllm.units import GIB, format_bytes, format_count

    shape, first = model_shape(run), estimates[0]
    typer.echo(
        f"{format_count(first.parameters)} parameters: {shape.num_layers} layers x {shape.hidden_size}, "
        f"{shape.num_attention_heads} heads, {shape.vocab_size:,} tokens ({shape.family}); "
        f"{micro_batch_size} x {run.batch.sequence_length} tokens a forward, {run.training.precision}, "
        f"activation checkpointing {run.training.activation_checkpointing}; {first.world_size} GPU"
        + ("s" if first.world_size > 1 else "")
    )
    names = [name.removesuffix("_bytes") for name in first.as_dict()["per_gpu"] if name != "total_bytes"]
    print_table(
        ["ZeRO stage", *names, "peak GiB", "in", "host GiB"],
        [
            (
                str(estimate.zero_stage),
                *(f"{getattr(estimate.peak, f'{name}_bytes') / GIB:.2f}" for name in names),
                f"{estimate.peak.total_bytes / GIB:.2f}",
                estimate.peak_phase,
                f"{estimate.host_bytes / GIB:.2f}",
            )
            for estimate in estimates
        ],
    )
    for estimate in estimates:
        fitting = [name for name, fits in estimate.as_dict()["fits"].items() if fits]
        typer.echo(
            f"stage {estimate.zero_stage}: {format_bytes(estimate.peak.total_bytes)} on each GPU; "
            f"fits {', '.join(fitting) if fitting else 'none of the known GPUs'}"
        )
