"""From text to token shards: a folder that is either complete or absent, made by however many attempts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from dsllm.data.preparation.assemble import assemble, finish, reuse
from dsllm.data.preparation.encode import encoder, is_much
from dsllm.data.preparation.join import Joiner
from dsllm.data.preparation.piece_store import BadPieceError
from dsllm.data.preparation.pipeline import InputChangedError, Pipeline, Progress, size_of
from dsllm.data.preparation.recipe import open_sources, prepared_fields, settle_recipe
from dsllm.data.preparation.workplace import (
    PIECES,
    SHARDS,
    STAGING,
    refuse_foreign_files,
    start_over,
    workplace,
)
from dsllm.data.shards import MANIFEST_FILE, Manifest, read_manifest
from dsllm.launch.devices import num_cores
from dsllm.spec.derived import data_directory
from dsllm.spec.sections import Spec

logger = logging.getLogger(__name__)

Report = Callable[[Progress], None]


def default_directory(spec: Spec) -> Path:
    """Where the spec's prepared data lives."""
    return Path(data_directory(spec)).expanduser()


def prepare(
    spec: Spec,
    directory: Path | str,
    *,
    processes: int | None = None,
    skip_bad_lines: bool = False,
    on_progress: Report | None = None,
) -> Manifest:
    """Make the spec's tokenizer and token shards in `directory`, or reuse them where they are already there.

    `processes` tokenize (as many as cores when None); the bytes written do not depend on it, nor on how often
    preparation was interrupted. `on_progress` is called every now and then. Raises UserError for a folder that holds
    something else or a full disk, DataError for sources that cannot be used, DsllmError for a disk that fails; no
    half-made shard is left in the folder, and finished work is kept in its `.partial` for the next attempt.
    """
    target = Path(directory)
    if (target / MANIFEST_FILE).is_file():
        return reuse(spec, target)
    refuse_foreign_files(target)
    staging = target / STAGING
    report = on_progress or (lambda progress: None)
    with workplace(staging, prepared_fields(spec)):
        if (target / MANIFEST_FILE).is_file():  # another process was faster
            return reuse(spec, target)
        while not (staging / MANIFEST_FILE).is_file():
            _write_shards(spec, staging, processes or num_cores(), skip_bad_lines, report)
        finish(staging)
    return read_manifest(target)


def _write_shards(spec: Spec, staging: Path, processes: int, skip_bad_lines: bool, report: Report) -> None:
    """All that the manifest names, and the manifest, in the staging folder; or, where what earlier attempts left there
    turns out to be of no use, less of that."""
    report(Progress())
    sources = open_sources(spec, skip_bad_lines=skip_bad_lines)
    try:
        with encoder(processes, much=is_much(size_of(sources))) as encode:
            recipe = settle_recipe(spec, sources, staging, skip_bad_lines=skip_bad_lines)
            with Joiner(staging / SHARDS, recipe.routing(spec)) as joiner:
                # Copies are found among all documents, so that no piece is joined before the last one is there.
                joined = () if spec.data.drop_duplicates else joiner.joined
                pipeline = Pipeline(sources, staging / PIECES, joined=joined, on_progress=report)
                assemble(spec, recipe, staging, pipeline.run(encode, recipe.encoding(spec, staging)), joiner)
    except InputChangedError:
        logger.warning("%s: sources changed since preparation was interrupted; starting over", staging.parent)
        start_over(staging)
    except BadPieceError as error:
        logger.warning("%s: damaged, as after a power cut; making it again", error)
        Path(str(error)).unlink(missing_ok=True)
