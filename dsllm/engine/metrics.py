"""Where the numbers of a step go: `metrics.jsonl`, TensorBoard, Weights & Biases. Rank 0 only."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import textwrap
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from dsllm.engine import ranks
from dsllm.engine.memory_meter import MemoryMeter
from dsllm.engine.progress import ProgressReport
from dsllm.engine.run_folder import RunFolder
from dsllm.plan.batch import BatchPlan
from dsllm.plan.hardware import gpu_of_device
from dsllm.plan.model_shape import ModelShape, flops_per_token
from dsllm.spec.sections import Spec, Wandb

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Sink = Callable[[Record], None]

KIB = 1024  # Linux counts ru_maxrss in KiB


class Recorder:
    """Completes the record of a step and hands it to every sink; there are none on ranks other than 0."""

    def __init__(
        self,
        open_sinks: Callable[[int], Sequence[Sink]],
        first_step: int,
        *,
        tokens_per_step: int,
        flops_per_token: int,
        peak_flops: float | None,
        memory: MemoryMeter,
    ) -> None:
        """`open_sinks` opens those of a run that goes on after a step. `peak_flops` is what all ranks together can do
        in a second, None where it is not known."""
        self._open_sinks = open_sinks
        self._sinks = open_sinks(first_step)
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._memory = memory

    def __call__(self, record: Record) -> None:
        """Add what follows from the step and its seconds: tokens, their rate, utilisation, memory."""
        if not self._sinks:
            return
        rate = self._tokens_per_step / record["step_seconds"]
        full = {
            **record,
            "tokens": record["step"] * self._tokens_per_step,
            "tokens_per_second": rate,
            "peak_memory_bytes": peak_memory_bytes(self._memory),
        }
        if self._peak_flops:
            full["mfu"] = rate * self._flops_per_token / self._peak_flops
        for sink in self._sinks:
            sink(full)

    def go_back(self, step: int) -> None:
        """Take out what was recorded after `step`, as at a resume: the run does those steps again."""
        self._sinks = self._open_sinks(step)


def peak_memory_bytes(memory: MemoryMeter) -> int:
    """Largest memory so far: what torch's allocator held or, where that is not measured, the process's resident set."""
    if memory.measured is not None:
        return memory.measured.largest_bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


@contextmanager
def open_recorder(
    spec: Spec,
    shape: ModelShape,
    folder: RunFolder,
    batch: BatchPlan,
    world: ranks.World,
    first_step: int,
    train_steps: int,
    memory: MemoryMeter,
) -> Iterator[Recorder]:
    """A recorder to the screen and everything that the spec asks for, of a run that goes on after `first_step`."""
    with ExitStack() as stack:
        # These can show a step again: wandb by the step of the record, the screen by its time.
        steady: list[Sink] = []
        if world.rank == 0:
            if spec.logging.wandb is not None and spec.logging.wandb.mode != "disabled":
                steady.append(wandb_sink(folder.logs, spec.name, spec.logging.wandb))
            steady.append(stack.enter_context(closing(ProgressReport(first_step, train_steps))))

        def open_sinks(step: int) -> list[Sink]:
            if world.rank != 0:
                return []
            files = [jsonl_sink(folder.metrics, step)]
            if spec.logging.tensorboard:
                files.append(tensorboard_sink(folder.logs / "tensorboard", step))
            return files + steady

        yield Recorder(
            open_sinks,
            first_step,
            tokens_per_step=batch.tokens_per_step,
            flops_per_token=flops_per_token(shape, batch.sequence_length),
            peak_flops=peak_flops(spec, world),
            memory=memory,
        )


def peak_flops(spec: Spec, world: ranks.World) -> float | None:
    """FLOP a second that all ranks have together in 16 bits, dense; None for a device that is not in the catalogue."""
    if ranks.device_type() != "cuda" or spec.training.precision == "fp32":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name())
    return gpu.peak_flops * world.size if gpu else None


def scalars(record: Record) -> Record:
    """The record as dashboards draw it, a name for each number: `val_losses: {news: 4.1}` -> `val_loss/news: 4.1`.
    Text is no number, and left out."""
    by_label = {f"val_loss/{label}": loss for label, loss in record.get("val_losses", {}).items()}
    return {name: value for name, value in record.items() if name not in ("val_losses", "samples")} | by_label


def jsonl_sink(path: Path, resumed_step: int) -> Sink:
    """One JSON object a line. Steps that a resume will run again are taken out first, so that each step stands once."""
    kept = [line for line in _text(path).splitlines(keepends=True) if _step_of(line) <= resumed_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)

    def write(record: Record) -> None:
        try:
            with path.open("a") as file:
                file.write(json.dumps(_without_infinities(record)) + "\n")
        except OSError as error:  # a full disk ends no run: it may have room again for the next checkpoint
            logger.warning("%s lost step %d: %s", path, record["step"], error.strerror)

    return write


def recent_losses(path: Path, step: int, count: int) -> tuple[float, ...]:
    """The finite losses of the last `count` steps up to `step`, oldest first, from a run's `metrics.jsonl`."""
    lines = [line for line in _text(path).splitlines(keepends=True) if step - count < _step_of(line) <= step]
    losses = [json.loads(line)["loss"] for line in lines]
    return tuple(loss for loss in losses if loss is not None)


def tensorboard_sink(folder: Path, resumed_step: int) -> Sink:
    """A scalar for each number of a record, and its samples as text."""
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an interrupted run wrote beyond the checkpoint.
    writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(record: Record) -> None:
        for name, value in scalars(record).items():
            if name != "step":
                writer.add_scalar(name, value, record["step"])
        for number, sample in enumerate(record.get("samples", ()), 1):
            # Markdown, in which indented text is shown as it is.
            text = textwrap.indent(sample["prompt"] + sample["text"], "    ", lambda line: True)
            writer.add_text(f"sample/{number}", text, record["step"])
        writer.flush()

    return write


def wandb_sink(logs: Path, run_name: str, settings: Wandb) -> Sink:
    """Online with a key, offline without. Its faults are warnings: a dashboard never ends a run."""
    try:
        import wandb

        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=run_name,
            id=_wandb_id(logs),
            resume="allow",
            dir=str(logs),
            mode=_wandb_mode(settings),
        )
        run.define_metric("*", step_metric="step")  # wandb's own counter cannot go back, as a resume does
    except Exception as error:
        logger.warning("Weights & Biases is off: %s", error)
        return lambda record: None

    def write(record: Record) -> None:
        try:
            rows = [[record["step"], sample["prompt"], sample["text"]] for sample in record.get("samples", ())]
            tables = {"samples": wandb.Table(columns=["step", "prompt", "text"], data=rows)} if rows else {}
            run.log(scalars(record) | tables)
        except Exception as error:
            logger.warning("Weights & Biases lost step %d: %s", record["step"], error)

    return write


def _wandb_id(logs: Path) -> str:
    """An id that a run folder keeps, so that a resume goes on in the same dashboard."""
    path = logs / "wandb-id"
    if not path.is_file():
        logs.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()


def _wandb_mode(settings: Wandb) -> Any:
    if settings.mode != "auto":
        return settings.mode
    has_key = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in _text(Path.home() / ".netrc")
    return "online" if has_key else "offline"


def _without_infinities(value: Any) -> Any:
    """JSON has none: the norm of a skipped step is null."""
    if isinstance(value, dict):
        return {name: _without_infinities(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_without_infinities(child) for child in value]
    return value if isinstance(value, str) or math.isfinite(value) else None


def _step_of(line: str) -> float:
    """The step of a record; infinite for a line that a killed run left unfinished."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
