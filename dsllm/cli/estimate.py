"""The command that predicts memory: estimate-memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Optional, cast

import typer

from dsllm.cli.hardware import Hardware, known_devices
from dsllm.cli.networks import read_spec, workload_of
from dsllm.cli.options import AsJson, Overrides
from dsllm.cli.plain import PlainCommand, one_of, parameter_count, whole_number

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dsllm.model.trace import Trace
    from dsllm.plan.activations import Activations
    from dsllm.plan.calibration import DeviceConstants
    from dsllm.plan.hardware import Gpu
    from dsllm.plan.memory import MemoryEstimate
    from dsllm.plan.way import Way
    from dsllm.plan.workload import Device

app = typer.Typer(rich_markup_mode=None)

TYPICAL_PARAMETERS = 10**9
"""Of the run around a network that --config gives."""
STAGES = ("0", "1", "2", "3")
DEVICES = ("cuda", "cpu")


@app.command(cls=PlainCommand, epilog="Example: dsllm estimate-memory --spec 1b --gpus 8    or: --params 1e9 --zero 3")
def estimate_memory(
    parameters: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option("--params", metavar="N", help="Parameters, as 1e9 or 350M; a typical shape is assumed."),
    ] = None,
    spec: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--spec", metavar="SPEC", help="A spec file or the name of a preset: exact shapes."),
    ] = None,
    config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--config",
            metavar="FOLDER",
            help="With --trace: the config.json of any Hugging Face causal model, in the place of the spec's network.",
        ),
    ] = None,
    zero: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--zero", metavar="0|1|2|3", help="ZeRO stage; all of them when absent."),
    ] = None,
    gpus: Annotated[str, typer.Option("--gpus", metavar="N", help="Ranks in all.")] = "1",
    micro_batch_size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--micro-batch-size",
            metavar="N",
            help="Sequences per GPU per forward; the spec's own when absent, or 1 where it says auto.",
        ),
    ] = None,
    gpu: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--gpu", metavar="NAME", help="Whether this one holds it, as a100-40gb; else what to change."),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="cuda|cpu", help="What the ranks run on.")] = "cuda",
    with_trace: Annotated[
        bool, typer.Option("--trace", help="Trace the real model too, without its memory; needs torch.")
    ] = False,
    hardware: Hardware = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Predict the memory of each GPU, term by term, which GPUs it fits, and else what to change."""
    from dsllm.cli.estimate_report import as_document, report
    from dsllm.errors import UserError
    from dsllm.plan.hardware import gpu_named

    stages = tuple(int(stage) for stage in (STAGES if zero is None else (one_of("--zero", zero, STAGES),)))
    on = cast("Device", one_of("--device", device, DEVICES))
    world_size = whole_number("--gpus", gpus, "ranks")
    micro = None if micro_batch_size is None else whole_number("--micro-batch-size", micro_batch_size, "sequences")
    known = known_devices(hardware)
    named = gpu_named(gpu, known) if gpu is not None else None
    if named is not None and named.is_cpu != (on == "cpu"):
        raise UserError(f"--gpu: given {named.name} with --device {on}; it is no such device; change either")
    way, count = _way(parameters, spec, config, overrides or [], world_size, micro)
    traced: Trace | None = None
    network: str = way.run.shape.family
    if with_trace or config is not None:
        way, traced, network = _traced(way, spec, config, overrides or [], on, with_trace)
    asked = Asked(way, network, stages, count, on, known, named, _constants(named, on), traced)
    if as_json:
        documents = [as_document(asked, stage) for stage in stages]
        typer.echo(json.dumps(documents if zero is None else documents[0], indent=2))
    else:
        report(asked)


@dataclass(frozen=True)
class Asked:
    """What is to be predicted, and for which device."""

    given: Way
    network: str
    """The type of model, as Hugging Face has it."""
    stages: tuple[int, ...]
    parameters: int | None
    """Where their number is all that is known."""
    device: Device
    known: tuple[Gpu, ...]
    """The catalogue, and the user's own devices."""
    gpu: Gpu | None
    """The one that is to hold it, where one is named."""
    constants: DeviceConstants | None
    """Where the device is calibrated."""
    trace: Trace | None

    def at_stage(self, stage: int) -> Way:
        return replace(self.given, run=self.given.run.at_stage(stage))

    def predict(self, way: Way, traced: Activations | None = None) -> MemoryEstimate:
        """With the runtime's share as calibrated, else as the catalogue has it; `traced` in the place of arithmetic."""
        from dsllm.plan.memory import estimate_memory

        beside = self.constants or self.gpu
        return estimate_memory(
            way.run,
            way.world_size,
            way.micro_batch_size,
            self.parameters,
            device=self.device,
            runtime_bytes=beside.runtime_bytes if beside else None,
            reserved_ratio=(beside.reserved_ratio or 1.0) if beside else 1.0,
            traced=traced,
        )


# --- what is given ----------------------------------------------------------------------------------------------------


def _way(
    parameters: str | None,
    spec: str | None,
    config: str | None,
    overrides: list[str],
    world_size: int,
    micro_batch_size: int | None,
) -> tuple[Way, int | None]:
    """The run on its ranks, and the number of parameters where only that is given.

    Raises UserError where nothing or too much is given, and where a spec's batch does not divide over the ranks.
    """
    from dsllm.errors import UserError
    from dsllm.plan.typical import typical_workload
    from dsllm.plan.way import Way

    if config is None and (parameters is None) == (spec is None):
        raise UserError("estimate-memory: give one of --params and --spec; for example --params 1e9, or --spec 1b")
    if config is not None and parameters is not None:
        raise UserError("--config: given with --params; a network has one source; remove either")
    if spec is not None:
        return _way_of_spec(spec, overrides, world_size, micro_batch_size), None
    if overrides:
        raise UserError("--set: nothing to override without --spec; give --spec, or remove --set")
    count = None if parameters is None else parameter_count(parameters)
    micro = micro_batch_size or 1
    # no batch is known: one micro-batch a step, which is what everybody needs at least
    run = replace(typical_workload(count or TYPICAL_PARAMETERS), global_batch_size=micro * world_size)
    return Way(run, world_size, micro, has_batch=False), count


def _way_of_spec(spec: str, overrides: list[str], world_size: int, micro_batch_size: int | None) -> Way:
    """Raises UserError where the batch leaves a remainder: what cannot run is not predicted."""
    from dsllm.plan.batch import resolve_batch
    from dsllm.plan.way import Way

    loaded = read_spec(spec, overrides)
    run = workload_of(loaded)
    micro = micro_batch_size or run.micro_batch_size or 1
    resolve_batch(loaded.batch.model_copy(update={"micro_batch_size": micro}), world_size)
    return Way(run, world_size, micro)


def _traced(
    way: Way, spec: str | None, config: str | None, overrides: list[str], device: Device, with_trace: bool
) -> tuple[Way, Trace, str]:
    """The run with the spec's network, or the one that `config` names; the network's trace; and its type."""
    from importlib.util import find_spec

    from dsllm.errors import UserError

    if not with_trace:
        raise UserError("--config: given without --trace, which alone can read any network; add --trace")
    if spec is None and config is None:
        raise UserError("--trace: given with --params, for which there is no network; give --spec, or --config")
    if find_spec("torch") is None:
        raise UserError("--trace: given on a machine without torch, which traces; pip install 'dsllm[train]'")
    from dsllm.model.trace import trace

    if config is None:
        from dsllm.model.build import model_config

        network = model_config(read_spec(str(spec), overrides))
    else:
        network, way = _around(way, config)
    return way, trace(network, way.run, way.micro_batch_size, device), network.model_type


def _around(way: Way, config: str) -> tuple[PretrainedConfig, Way]:
    """The network that `config` names, and the run with it; a run that nobody gave is no longer than it reads."""
    from dsllm.errors import UserError
    from dsllm.model.trace import config_of, traced_shape
    from dsllm.spec.derived import dropout_of

    network = config_of(config)
    shape = traced_shape(network)
    tokens, limit = way.run.sequence_length, shape.max_position_embeddings
    if tokens > limit and way.has_batch:
        raise UserError(f"--config: given a network that reads at most {limit} tokens; lower batch.sequence_length")
    dropout = dropout_of(network.to_dict())
    run = replace(way.run, shape=shape, sequence_length=min(tokens, limit), dropout=dropout)
    return network, replace(way, run=run)


def _constants(gpu: Gpu | None, device: Device) -> DeviceConstants | None:
    """What was calibrated: of the GPU that is named, of the CPU, or of this machine's own GPU."""
    from dsllm.cli.calibrate import known_constants

    known = known_constants()
    if not known:
        return None
    from dsllm.plan.calibration import constants_of_gpu
    from dsllm.plan.hardware import CPU

    if device == "cpu":
        return known.get(CPU)
    if gpu is not None:
        return constants_of_gpu(known, gpu)
    from dsllm.launch.devices import local_gpus

    own = local_gpus()
    return known.get(own[0].name) if own else None
