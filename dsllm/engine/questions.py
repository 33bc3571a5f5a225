"""What a run asks its model at intervals, made before its first step: a mistake in it costs none."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deepspeed import DeepSpeedEngine

from dsllm.data.hellaswag import Item, read_items
from dsllm.data.shards import read_manifest
from dsllm.engine import evaluation, inputs, ranks, samples
from dsllm.engine.activity import Activity
from dsllm.engine.run_folder import RunFolder
from dsllm.engine.trainer import Question
from dsllm.evaluation.validation import mix_shares
from dsllm.plan.batch import BatchPlan
from dsllm.spec.sections import Spec


class Material(NamedTuple):
    """What the spec's questions are made of, beside the validation sets."""

    hellaswag: list[Item]
    prompts: samples.Prompts | None


def read_material(spec: Spec, tokenizer: Path) -> Material:
    """Read by rank 0, for all. Collective.

    Raises UserError and DataError for a file or a prompt that cannot be asked.
    """

    def read() -> Material:
        hellaswag = spec.evaluation.hellaswag
        items = read_items(hellaswag.path, hellaswag.items) if hellaswag is not None else []
        return Material(items, samples.read_prompts(spec, tokenizer))

    return ranks.on_rank_0(read)


def open_questions(
    spec: Spec,
    data: Path,
    folder: RunFolder,
    batch: BatchPlan,
    world: ranks.World,
    engine: DeepSpeedEngine,
    material: Material,
    activity: Activity,
) -> list[Question]:
    """This rank's part in each question, in the order in which a record has the answers.

    Raises DataError for an ending that is longer than the model reads.
    """
    return [
        _validation(spec, data, batch, world, engine, activity),
        *_hellaswag(spec, folder, world, engine, material, activity),
        *_samples(spec, folder, batch, engine, material, activity),
    ]


def _validation(
    spec: Spec, data: Path, batch: BatchPlan, world: ranks.World, engine: DeepSpeedEngine, activity: Activity
) -> Question:
    sets = activity.counting(inputs.open_validation(data, spec, batch, world))
    ask = functools.partial(evaluation.evaluate, engine, sets, mix_shares(spec.data, read_manifest(data)))
    return Question(spec.evaluation.interval, ask, at_first=True)


def _hellaswag(
    spec: Spec,
    folder: RunFolder,
    world: ranks.World,
    engine: DeepSpeedEngine,
    material: Material,
    activity: Activity,
) -> Iterator[Question]:
    settings = spec.evaluation.hellaswag
    if settings is not None:
        dealt = inputs.deal_hellaswag(material.hellaswag, folder, engine.module.causal_lm, world)
        ask = functools.partial(evaluation.ask_hellaswag, engine, functools.partial(activity.ticking, dealt))
        yield Question(settings.interval, ask)


def _samples(
    spec: Spec,
    folder: RunFolder,
    batch: BatchPlan,
    engine: DeepSpeedEngine,
    material: Material,
    activity: Activity,
) -> Iterator[Question]:
    settings = spec.evaluation.samples
    if settings is not None:
        write = functools.partial(
            samples.write_samples,
            engine,
            settings,
            material.prompts,
            seed=spec.seed,
            micro_batch_size=batch.micro_batch_size,
            tokenizer_folder=folder.tokenizer,
            activity=activity,
        )
        yield Question(settings.interval, write)
