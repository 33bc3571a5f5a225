"""Tokens for the loop: prepared where that is quick, opened, and dealt out to this rank."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel

from dsllm.data.hellaswag import Item
from dsllm.data.loader import MicroBatch, training_micro_batches, validation_micro_batches
from dsllm.data.mixture import repeated_too_often
from dsllm.data.preparation.recipe import labelled_sources, open_sources
from dsllm.data.prepare import default_directory, prepare
from dsllm.data.run_samples import RunSamples, open_run_samples, open_validation_samples
from dsllm.data.shards import MANIFEST_FILE, TOKENIZER_DIRECTORY, verify, verify_edges
from dsllm.data.sources.spans import FileSource
from dsllm.engine import ranks
from dsllm.engine.run_folder import RunFolder
from dsllm.errors import UserError
from dsllm.evaluation.choices import Dealt, batches, deal, encode
from dsllm.model.positions import num_positions
from dsllm.plan.batch import BatchPlan
from dsllm.spec.derived import remote_kind
from dsllm.spec.sections import Spec
from dsllm.units import format_text_bytes

logger = logging.getLogger(__name__)

ReadTraining = Callable[[int, Collection[int]], Generator[MicroBatch, None, None]]
"""Reads from a step on, without end, and without the skipped batches."""

VERIFIED_TOKENS = 500_000_000
"""Up to so many tokens (1 GB in 16 bits, a second or two) every file is read again at each start; above that the ends
of the shards, and `dsllm data inspect --verify` reads them all."""
PREPARED_AT_START_BYTES = 300_000_000
"""Text that is prepared while the other ranks wait, at most: five minutes for a core that tokenizes 1 MB a second,
where they wait for thirty."""
TEXT_IN_COMPRESSED = 5
"""Bytes of text that a byte of a compressed file is counted as; Parquet is compressed inside. English shrinks to a
third by gzip and to a quarter by zstd at its best, source code and lines of JSON to about a fifth."""


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
        (verify if manifest.tokens <= VERIFIED_TOKENS else verify_edges)(directory)
        # Packs what is to be packed, so that the other ranks find the plans; and reports what is wrong only once.
        open_run_samples(directory, spec.data, spec.batch.sequence_length, spec.seed)
        open_validation_samples(directory, spec.data, spec.batch.sequence_length)
        shutil.copytree(directory / TOKENIZER_DIRECTORY, folder.tokenizer, dirs_exist_ok=True)
        return directory

    return ranks.on_rank_0(ready_on_rank_0)


def open_training(directory: Path, spec: Spec, batch: BatchPlan, world: ranks.World) -> ReadTraining:
    """What reads this rank's micro-batches. Rank 0 logs what the run takes of each source."""
    samples = open_run_samples(directory, spec.data, batch.sequence_length, spec.seed)
    if world.rank == 0:
        _log_uses(samples, spec, batch)

    def read(start_step: int, skipped_batches: Collection[int]) -> Generator[MicroBatch, None, None]:
        return training_micro_batches(
            samples,
            start_step=start_step,
            global_batch_size=batch.global_batch_size,
            micro_batch_size=batch.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            skipped_batches=skipped_batches,
            pin=ranks.device_type() == "cuda",
        )

    return read


def open_validation(
    directory: Path, spec: Spec, batch: BatchPlan, world: ranks.World
) -> dict[str, Callable[[], Iterator[MicroBatch]]]:
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


def deal_hellaswag(
    items: Sequence[Item], folder: RunFolder, causal_lm: PreTrainedModel, world: ranks.World
) -> list[Dealt]:
    """This rank's batches of the items, in the tokens of the run, as long as the model reads.

    Raises DataError for an ending that is longer.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder.tokenizer, trust_remote_code=False)
    encoded = encode(items, tokenizer, num_positions(causal_lm.config))
    vocab_size = causal_lm.config.get_text_config().vocab_size
    return deal(batches(encoded, vocab_size, causal_lm.dtype.itemsize), world.rank, world.size)


def _refuse_long_preparation(spec: Spec, directory: Path) -> None:
    """UserError for text that comes over the network, or is long; DataError for text that is not there."""
    remote = remote_kind(spec.data)
    text_bytes = 0 if remote else _text_bytes(spec)
    if remote or text_bytes > PREPARED_AT_START_BYTES:
        what = f"a {remote} source" if remote else f"about {format_text_bytes(text_bytes)} of text"
        raise UserError(
            f"{directory}: no prepared tokens there, and with {what} every rank would wait for them; first run "
            f"dsllm data prepare with this spec"
        )


def _text_bytes(spec: Spec) -> int:
    """Text in the files of all sources, about, without reading it; DataError for a source that is not there."""
    kinds = {label: source.kind for label, source in labelled_sources(spec).items()}
    return sum(
        file.size_bytes * (TEXT_IN_COMPRESSED if file.codec or kinds[label] == "parquet" else 1)
        for label, source in open_sources(spec).items()
        if isinstance(source, FileSource)
        for file in source.files
    )


def _log_uses(samples: RunSamples, spec: Spec, batch: BatchPlan) -> None:
    uses = samples.mixture.uses(spec.train_steps * batch.global_batch_size)
    for use in uses:
        logger.info("%s", use.sentence())
    for warning in repeated_too_often(uses, spec.data.max_epochs):
        logger.warning("%s", warning)
