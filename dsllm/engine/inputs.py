"""Tokens for the loop: prepared where that is quick, opened, and dealt out to this rank."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dsllm.data.loader import training_micro_batches, validation_micro_batches
from dsllm.data.mixture import repeated_too_often
from dsllm.data.prepare import default_directory, open_sources, prepare
from dsllm.data.run_samples import RunSamples, open_run_samples, open_validation_samples
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
PREPARED_AT_START_BYTES = 300_000_000
"""Text that is prepared while the other ranks wait, at most: five minutes for a core that tokenizes 1 MB a second,
where they wait for thirty."""

MicroBatches = Iterator[dict[str, torch.Tensor]]


def ready_data(spec: Spec, folder: RunFolder) -> Path:
    """The folder of the spec's tokens, prepared and packed by rank 0 where that is missing; the tokenizer goes into the
    run.

    Collective. Raises UserError for text whose preparation takes longer than ranks should wait.
    """

    def ready_on_rank_0() -> Path:
        directory = default_directory(spec)
        if not (directory / MANIFEST_FILE).is_file():
            _refuse_long_preparation(spec, directory)
            logger.info("preparing tokens in %s", directory)
        manifest = prepare(spec, directory)
        if manifest.tokens <= VERIFIED_TOKENS:
            verify(directory)
        # Packs what is to be packed, so that the other ranks find the plans; and reports what is wrong only once.
        open_run_samples(directory, spec.data, spec.batch.sequence_length, spec.seed)
        open_validation_samples(directory, spec.data, spec.batch.sequence_length)
        shutil.copytree(directory / TOKENIZER_DIRECTORY, folder.tokenizer, dirs_exist_ok=True)
        return directory

    return ranks.on_rank_0(ready_on_rank_0)


def open_training(directory: Path, spec: Spec, batch: BatchPlan, world: ranks.World, first_step: int) -> MicroBatches:
    """This rank's micro-batches from `first_step` on, without end. Rank 0 logs what the run takes of each source."""
    samples = open_run_samples(directory, spec.data, batch.sequence_length, spec.seed)
    if world.rank == 0:
        _log_uses(samples, spec, batch)
    return training_micro_batches(
        samples,
        start_step=first_step,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        pin=ranks.device_type() == "cuda",
    )


def open_validation(
    directory: Path, spec: Spec, batch: BatchPlan, world: ranks.World
) -> dict[str, Callable[[], MicroBatches]]:
    """For each validation set, by its label, this rank's share of its samples, the same at each call."""
    return {
        label: functools.partial(
            validation_micro_batches,
            samples,
            max_sequences=spec.evaluation.batches * batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            pin=ranks.device_type() == "cuda",
        )
        for label, samples in open_validation_samples(directory, spec.data, batch.sequence_length).items()
    }


def _refuse_long_preparation(spec: Spec, directory: Path) -> None:
    """UserError for text that comes over the network, or is long; DataError for text that is not there."""
    kinds = [source.kind for source in spec.data.sources + spec.data.validation_sources]
    remote = next((kind for kind in kinds if kind in ("huggingface", "deeplake")), None)
    text_bytes = 0 if remote else sum(source.size_bytes or 0 for source in open_sources(spec).values())
    if remote or text_bytes > PREPARED_AT_START_BYTES:
        what = f"a {remote} source" if remote else f"{text_bytes / 1e6:,.0f} MB of text"
        raise UserError(
            f"{directory}: no prepared tokens there, and with {what} every rank would wait for them; first run "
            f"dsllm data prepare with this spec"
        )


def _log_uses(samples: RunSamples, spec: Spec, batch: BatchPlan) -> None:
    uses = samples.mixture.uses(spec.train_steps * batch.global_batch_size)
    for use in uses:
        logger.info("%s", use.sentence())
    for warning in repeated_too_often(uses, spec.data.max_epochs):
        logger.warning("%s", warning)
