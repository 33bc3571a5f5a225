"""Commands that read a spec and say what is in it: validate, schema, presets, config."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dsllm.cli.hardware import Hardware, known_devices
from dsllm.cli.networks import counted, read_spec, workload_of
from dsllm.cli.options import AsJson, Overrides, SpecArgument

if TYPE_CHECKING:
    from dsllm.spec.sections import Spec

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog="Example: dsllm validate 1b --set zero.stage=3 --set zero.offload_param=cpu")
def validate(spec: SpecArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a spec and report every problem at once, each with its remedy."""
    from dsllm.errors import SpecError

    try:
        facts = _facts(read_spec(spec, overrides))
    except SpecError as error:
        if not as_json:
            raise
        typer.echo(json.dumps({"valid": False, "problems": error.problems}, indent=2))
        raise typer.Exit(error.exit_code) from error
    typer.echo(json.dumps({"valid": True, "problems": [], **facts}, indent=2) if as_json else _sentence(spec, facts))


@app.command(epilog="Example: dsllm schema > spec.schema.json")
def schema() -> None:
    """Print the JSON Schema of a spec, with which editors complete and check one."""
    from dsllm.spec.schema import spec_schema

    typer.echo(json.dumps(spec_schema(), indent=2, ensure_ascii=False))


@app.command(epilog="Example: dsllm presets --json")
def presets(as_json: AsJson = False) -> None:
    """List the specs that come with dsllm."""
    from dsllm.spec.load import load_spec, preset_names

    rows = [{"preset": name, **_facts(load_spec(name))} for name in preset_names()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from dsllm.cli.tables import print_table
    from dsllm.units import format_count

    print_table(
        ["preset", "family", "parameters", "tokens", "steps", "ZeRO", "precision"],
        [
            (
                row["preset"],
                row["family"],
                counted(row["parameters"], row["active_parameters"]).replace(" parameters", ""),
                format_count(row["tokens"]),
                f"{row['train_steps']:,}",
                str(row["zero_stage"]),
                row["precision"],
            )
            for row in rows
        ],
    )


@app.command(epilog="Example: dsllm config 1b --world-size 16 > ds_config.json")
def config(
    spec: SpecArgument,
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Ranks in all.", show_default=False)],
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="What the ranks run on.")] = "cuda",
    gpu: Annotated[
        str, typer.Option(help="GPU that an automatic micro-batch size is chosen for; see estimate-memory.")
    ] = "a100-80gb",
    hardware: Hardware = None,
    overrides: Overrides = None,
) -> None:
    """Print the DeepSpeed JSON of a spec, fully resolved."""
    from dsllm.ds_config import build_ds_config
    from dsllm.plan.hardware import gpu_named
    from dsllm.plan.search import choose_micro_batch

    loaded = read_spec(spec, overrides)
    run = workload_of(loaded)
    chosen_for = gpu_named(gpu, known_devices(hardware))
    micro_batch_size = choose_micro_batch(
        run,
        world_size,
        chosen_for.memory_bytes,
        runtime_bytes=chosen_for.runtime_bytes,
        reserved_ratio=chosen_for.reserved_ratio,
    )
    typer.echo(json.dumps(build_ds_config(loaded, world_size, device, micro_batch_size, run.shape), indent=2))


def _facts(spec: Spec) -> dict[str, Any]:
    """What a spec comes to, for people and for scripts."""
    from dsllm.model.shapes import shape_of

    shape = shape_of(spec)
    return {
        "name": spec.name,
        "family": shape.family,
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "train_steps": spec.train_steps,
        "tokens_per_step": spec.tokens_per_step,
        "tokens": spec.train_steps * spec.tokens_per_step,
        "zero_stage": spec.zero.stage,
        "precision": spec.training.precision,
    }


def _sentence(source: str, facts: dict[str, Any]) -> str:
    from dsllm.units import format_count

    return (
        f"{source}: valid. {facts['name']}: {counted(facts['parameters'], facts['active_parameters'])}, "
        f"{facts['train_steps']:,} steps of {facts['tokens_per_step']:,} tokens, {format_count(facts['tokens'])} in all"
    )
