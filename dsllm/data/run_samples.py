"""The samples of a run: those of all its sources, mixed; and the sets that it is validated on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsllm.data.mixture import Drawn, MixedSource, Mixture
from dsllm.data.order import Integers
from dsllm.data.packing import open_plan
from dsllm.data.samples import ConcatenatedSamples, PackedSamples, Rows, Samples
from dsllm.data.shards import Manifest, Split, TokenShards, read_manifest
from dsllm.errors import DataError
from dsllm.spec.derived import source_labels
from dsllm.spec.sections import Data


class RunSamples:
    """Sample `i` of the run for any `i` from 0 on: samples without end, each a pure function of the data and `i`."""

    def __init__(self, sources: Sequence[Samples], mixture: Mixture) -> None:
        """The sources in the order that the mixture has them in, all of the same sequence length."""
        assert len({samples.sequence_length for samples in sources}) == 1, "sources of unlike sequences"
        self.sources = tuple(sources)
        self.mixture = mixture
        self.sequence_length = sources[0].sequence_length
        self.pads = any(samples.pads for samples in sources)

    def draw(self, run_samples: Integers) -> Drawn:
        """Which samples of which sources these samples of the run are."""
        return self.mixture.draw(run_samples)

    def read(self, drawn: Drawn) -> Rows:
        """What was drawn, in its order."""
        present = np.unique(drawn.sources).tolist()
        if len(present) == 1:
            return self.sources[present[0]].read(drawn.samples)
        places = [drawn.sources == source for source in present]
        parts = [self.sources[source].read(drawn.samples[own]) for source, own in zip(present, places, strict=True)]
        positions = [rows.positions for rows in parts if rows.positions is not None]
        return Rows(
            inputs=_together(places, [rows.inputs for rows in parts]),
            labels=_together(places, [rows.labels for rows in parts]),
            positions=_together(places, positions) if positions else None,
        )

    def num_labels(self, drawn: Drawn) -> int:
        """Labels that count in all that was drawn, found without reading any token."""
        numbers = (
            self.sources[source].num_labels(drawn.samples[drawn.sources == source])
            for source in np.unique(drawn.sources).tolist()
        )
        return sum(int(number.sum()) for number in numbers)


def open_run_samples(directory: Path | str, data: Data, sequence_length: int, seed: int) -> RunSamples:
    """What a run trains on, from the prepared folder of `data`. Opening costs nothing per token.

    Raises DataError where a source of the mix, or all sources of a pool together, cannot fill one sample.
    """
    manifest = read_manifest(directory)
    drawn = [
        (label, source.weight)
        for label, source in zip(source_labels(data), data.sources, strict=False)
        if source.weight != 0
    ]
    opened: list[Samples] = []
    mixed: list[MixedSource] = []
    for label, weight in drawn:
        has_stream = "train" in manifest.source(label).streams
        samples = _open(Path(directory), manifest, label, "train", data, sequence_length) if has_stream else None
        if samples is not None and len(samples):
            opened.append(samples)
            mixed.append(MixedSource(label, len(samples), weight, samples.padding_share))
        elif weight is not None:
            raise _too_short(directory, manifest, [label], sequence_length)
    if not opened:
        raise _too_short(directory, manifest, [label for label, _ in drawn], sequence_length)
    return RunSamples(opened, Mixture(mixed, seed))


def open_validation_samples(directory: Path | str, data: Data | None, sequence_length: int) -> dict[str, Samples]:
    """The samples of each source that has documents to validate on, by its label; without `data`, which says how they
    are packed and masked, the plain stream.

    They hold every token but the first of the stream: the last one is padded. DataError where there are none at all.
    """
    manifest = read_manifest(directory)
    opened = {
        source.label: _open(Path(directory), manifest, source.label, "validation", data, sequence_length)
        for source in manifest.with_split("validation")
    }
    if not opened:
        raise DataError(
            f"{directory}: no document in it is held out; raise data.validation_fraction, and prepare again"
        )
    return opened


def _open(
    directory: Path, manifest: Manifest, label: str, split: Split, data: Data | None, sequence_length: int
) -> Samples:
    shards = TokenShards(directory, manifest, label, split)
    masks = data is not None and data.mask_documents
    if data is not None and data.packing == "best_fit":
        return PackedSamples(shards, open_plan(shards, sequence_length), sequence_length, mask_documents=masks)
    return ConcatenatedSamples(shards, sequence_length, mask_documents=masks, pads=split == "validation")


def _too_short(directory: Path | str, manifest: Manifest, labels: list[str], sequence_length: int) -> DataError:
    streams = [manifest.source(label).streams.get("train") for label in labels]
    tokens = sum(stream.tokens for stream in streams if stream is not None)
    return DataError(
        f"{directory}: {', '.join(labels)}: to train on there are {tokens} tokens, and one sample needs "
        f"{sequence_length + 1} of one source; give more text, or shorten batch.sequence_length"
    )


def _together(places: list[npt.NDArray[np.bool_]], parts: list[Integers]) -> Integers:
    """Rows of several sources, each at its places."""
    rows = np.empty((len(places[0]), parts[0].shape[1]), dtype=np.int64)
    for own, part in zip(places, parts, strict=True):
        rows[own] = part
    return rows
