"""Tokens for the loop: prepared where that is quick, opened, and dealt out to this rank."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dsllm.data.loader import TokenSamples, training_micro_batches, validation_micro_batches
from dsllm.data.prepare import default_directory, prepare
from dsllm.data.shards import MANIFEST_FILE, TOKENIZER_DIRECTORY, verify
from dsllm.engine import ranks
from dsllm.engine.run_folder import RunFolder
from dsllm.errors import UserError
from dsllm.plan.batch import BatchPlan
from dsllm.spec.sections import Spec

logger = logging.getLogger(__name__)

VERIFIED_TOKENS = 500_000_000
"""Up to so many tokens (1 GB in 16 bits, a second or two) the checksums are checked at each start; above that,
`dsllm data inspect --verify` does."""

MicroBatches = Iterator[dict[str, torch.Tensor]]


def ready_data(spec: Spec, folder: RunFolder) -> Path:
    """The folder of the spec's tokens, prepared by rank 0 where it is missing; the tokenizer goes into the run.

    Collective. Raises UserError for a dataset to be downloaded: preparing one takes longer than ranks should wait.
    """

    def prepare_on_rank_0() -> Path:
        directory = default_directory(spec)
        if not (directory / MANIFEST_FILE).is_file():
            if any(source.kind == "huggingface" for source in spec.data.sources):
                raise UserError(f"{directory}: no prepared tokens there; first run dsllm data prepare with this spec")
            logger.info("preparing tokens in %s", directory)
        manifest = prepare(spec, directory)
        if sum(shard.tokens for split in manifest.splits.values() for shard in split.shards) <= VERIFIED_TOKENS:
            verify(directory)
        shutil.copytree(directory / TOKENIZER_DIRECTORY, folder.tokenizer, dirs_exist_ok=True)
        return directory

    return ranks.on_rank_0(prepare_on_rank_0)


def open_training(directory: Path, spec: Spec, batch: BatchPlan, world: ranks.World, first_step: int) -> MicroBatches:
    """This rank's micro-batches from `first_step` on, without end."""
    return training_micro_batches(
        TokenSamples.open(directory, "train", batch.sequence_length),
        seed=spec.seed,
        start_step=first_step,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
    )


def open_validation(directory: Path, spec: Spec, batch: BatchPlan, world: ranks.World) -> Callable[[], MicroBatches]:
    """This rank's share of the validation samples, the same at each call."""
    samples = TokenSamples.open(directory, "validation", batch.sequence_length)

    def micro_batches() -> MicroBatches:
        return validation_micro_batches(
            samples,
            max_sequences=spec.evaluation.batches * batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
        )

    return micro_batches
