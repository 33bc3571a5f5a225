"""`dsllm evaluate`: what a trained model is worth."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional, TypeVar

import typer

from dsllm.cli.evaluate_report import Report
from dsllm.cli.models import quiet_libraries
from dsllm.cli.options import AsJson, Overrides
from dsllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dsllm.data.hellaswag import Item
    from dsllm.evaluation.choices import Score
    from dsllm.evaluation.sources import ValidationSets
    from dsllm.evaluation.validation import SetLoss
    from dsllm.spec.sections import Spec

T = TypeVar("T")


def evaluate(
    source: Annotated[
        Path, typer.Argument(help="Folder of a run, one of its checkpoints, or an exported folder.", show_default=False)
    ],
    spec: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option("--spec", metavar="SPEC", help="Whose validation sets to take; the run's own when absent."),
    ] = None,
    overrides: Overrides = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--data", metavar="DIR", help="Folder of the prepared tokens; that of the spec when absent."),
    ] = None,
    batches: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Global batches of each set at most, 0 for all; as many as training when absent."),
    ] = None,
    validation: Annotated[bool, typer.Option(help="Whether validation losses are taken.")] = True,
    hellaswag: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--hellaswag", metavar="FILE", help="Score HellaSwag: its JSONL file, or a dataset on the Hub."),
    ] = None,
    items: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Items of HellaSwag, the first ones; all when absent."),
    ] = None,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--tasks", metavar="NAMES", help="Tasks of lm-evaluation-harness, with commas between them."),
    ] = None,
    include_path: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--include-path", metavar="DIR", help="Folder of your own tasks for lm-evaluation-harness."),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Items of each task, the first ones; all when absent."),
    ] = None,
    num_fewshot: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Solved examples before each item of a task; as the task has it when absent."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a forward, of validation and of tasks.")] = 8,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; auto is a GPU where there is one.")
    ] = "auto",
    precision: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Type to compute in; when absent the training's, of an exported folder the device's usual."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a trained model: loss, perplexity and bits a byte; HellaSwag; tasks of lm-evaluation-harness.

    Example: dsllm evaluate runs/quickstart --batches 0
    """
    _refuse_without("--hellaswag", hellaswag, {"--items": items})
    task_options = {"--include-path": include_path, "--limit": limit, "--num-fewshot": num_fewshot}
    _refuse_without("--tasks", tasks, task_options)
    quiet_libraries()
    from dsllm.checkpoint.export import checkpoint_of, load_any
    from dsllm.checkpoint.layout import run_folder_of
    from dsllm.checkpoint.manifest import read_manifest
    from dsllm.data.hellaswag import read_items
    from dsllm.evaluation.harness import library, run_tasks
    from dsllm.evaluation.validation import combined
    from dsllm.model.build import DTYPES
    from dsllm.model.placement import place
    from dsllm.model.positions import num_positions
    from dsllm.spec.load import load_spec

    checkpoint = checkpoint_of(source)
    own = str(run_folder_of(checkpoint) / "spec.yaml") if checkpoint is not None else None
    wanted = _wanted_spec(spec or own, overrides or [])
    max_sequences = _max_sequences(batches, wanted)
    questions = read_items(hellaswag, items) if hellaswag is not None else []
    if tasks is not None:
        library()  # told now where it is not installed
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = load_any(source)
    positions = num_positions(model.config)
    sets = _sets(wanted, data, positions) if validation else None
    if sets is not None:
        sets.check_fit(source, tokenizer, positions)
    elif not questions and tasks is None:
        raise UserError(f"{source}: nothing to evaluate on; give --spec, --data, --hellaswag or --tasks")

    model = place(model, device, precision or (load_spec(own).training.precision if own is not None else None))
    step = read_manifest(checkpoint).step if checkpoint is not None else None
    computed_in = next(name for name, dtype in DTYPES.items() if dtype == model.dtype)
    report = Report(source, step, model.device.type, computed_in)
    if tasks is not None:
        ran = {"include_path": include_path, "limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
        report.tasks = run_tasks(model, tokenizer, tasks.split(","), **ran)
    if sets is not None:
        report.losses = _validate(model, sets, max_sequences, batch_size)
        report.combined = combined(report.losses, sets.shares)
    if questions:
        report.hellaswag = _ask_hellaswag(model, tokenizer, questions)
    typer.echo(json.dumps(report.as_json(), indent=2)) if as_json else report.show()


def _refuse_without(option: str, value: object, others: Mapping[str, object]) -> None:
    """UserError for options that say something of another one that is not given."""
    for name, given in others.items():
        if value is None and given is not None:
            raise UserError(f"{name}: given {given} without {option}, to which it belongs; give both, or neither")


def _wanted_spec(named: str | None, overrides: list[str]) -> Spec | None:
    """The spec whose validation sets are taken; None for an exported folder by itself."""
    from dsllm.spec.load import load_spec

    if named is None and overrides:
        raise UserError("--set: nothing to override without --spec; give --spec, or remove --set")
    return load_spec(named, overrides) if named is not None else None


def _max_sequences(batches: int | None, spec: Spec | None) -> int:
    """Of each validation set."""
    if spec is None and batches:
        raise UserError(
            f"--batches: given {batches}, and without a spec no size of a batch is known; give --spec, or --batches 0"
        )
    if spec is None or batches == 0:
        return sys.maxsize
    return (batches or spec.evaluation.batches) * spec.batch.global_batch_size


def _sets(spec: Spec | None, directory: Path | None, num_positions: int | None) -> ValidationSets | None:
    """The validation sets, where any are known."""
    from dsllm.evaluation.sources import USUAL_LENGTH, sets_of_folder, sets_of_spec

    if spec is not None:
        return sets_of_spec(spec, directory)
    return sets_of_folder(directory, num_positions or USUAL_LENGTH) if directory is not None else None


def _validate(model: PreTrainedModel, sets: ValidationSets, max_sequences: int, batch_size: int) -> dict[str, SetLoss]:
    """The loss of each set, by its label."""
    from dsllm.data.loader import validation_micro_batches
    from dsllm.evaluation.validation import set_loss
    from dsllm.model.loss import TrainingModel

    training_model = TrainingModel(model, "chunked").eval()
    losses = {}
    for label, samples in sets.samples.items():
        micro_batches = validation_micro_batches(
            samples, max_sequences=max_sequences, micro_batch_size=batch_size, rank=0, world_size=1
        )
        number = -(-min(max_sequences, len(samples)) // batch_size)
        watched = _watched(micro_batches, number, f"validation on {label}")
        losses[label] = set_loss(training_model, watched, model.device, sets.text_bytes)
    return losses


def _ask_hellaswag(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[Item]) -> Score:
    from dsllm.evaluation import choices
    from dsllm.model.positions import num_positions

    encoded = choices.encode(items, tokenizer, num_positions(model.config))
    batches = choices.batches(encoded, model.config.get_text_config().vocab_size, model.dtype.itemsize)
    dealt = choices.deal(batches, rank=0, world_size=1)
    answers = choices.answer(lambda ids: model(ids).logits, _watched(dealt, len(dealt), "HellaSwag"), model.device)
    return choices.score(answers.is_right.sum(), answers.is_right_normalized.sum(), len(items))


def _watched(pieces: Iterable[T], number: int, what: str) -> Iterable[T]:
    """The same pieces, with a bar that is gone when they are done; elsewhere than on a terminal there is none."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(pieces, what, total=number, console=console, transient=True, disable=not console.is_terminal)
