"""What preparation settles before it tokenizes: which fields it depends on, what is held out, the tokenizer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsllm.data.held_out import validation_threshold
from dsllm.data.preparation.encode import Encoding
from dsllm.data.preparation.join import Routing
from dsllm.data.preparation.pipeline import InputChangedError
from dsllm.data.preparation.workplace import RECIPE_FILE
from dsllm.data.shards import TOKENIZER_DIRECTORY, Record, file_sha256, folder_checksums, write_durably
from dsllm.data.sources.catalogue import kept_documents, open_source
from dsllm.data.sources.piece import Dropped, OpenSource
from dsllm.data.tokenizer import TOKENIZER_FILE, build_tokenizer, token_count
from dsllm.spec.derived import source_labels
from dsllm.spec.sections import Source, Spec

_READ_TIME_FIELDS = {"directory", "packing", "mask_documents", "max_epochs"}
"""Fields of `data` that decide how tokens are read, not what is prepared."""


class Recipe(Record):
    """How text becomes the prepared tokens, alike on every machine."""

    threshold: int
    """Documents of training sources whose key is below it are held out (see held_out.py)."""
    vocab_size: int
    end_of_text_id: int
    tokenizer_sha256: str
    tokenizer_files: dict[str, str]
    """SHA-256 of every file of the tokenizer's folder."""
    stamps: dict[str, str]
    """Of the sources, by label: they change with the text, on the machine that settled it."""

    def is_like(self, other: Recipe) -> bool:
        """Whether both make the same tokens of a text."""
        return self.model_copy(update={"stamps": other.stamps}) == other

    def encoding(self, spec: Spec, folder: Path) -> Encoding:
        """For the processes that tokenize; `folder` is the one of `settle_recipe`."""
        return Encoding(
            tokenizer_directory=folder / TOKENIZER_DIRECTORY,
            end_of_text_id=self.end_of_text_id,
            vocab_size=self.vocab_size,
            min_document_characters=spec.data.min_document_characters,
        )

    def routing(self, spec: Spec) -> Routing:
        """For the process that joins what they made."""
        labels = source_labels(spec.data)
        return Routing(
            labels=labels,
            validated_labels=frozenset(labels[len(spec.data.sources) :]),
            threshold=self.threshold,
            vocab_size=self.vocab_size,
            shard_tokens=spec.data.shard_tokens,
        )


def prepared_fields(spec: Spec) -> dict[str, Any]:
    """The fields that decide the prepared bytes, by their names in the spec."""
    data = spec.data.model_dump(mode="json", exclude=_READ_TIME_FIELDS)
    labels = iter(source_labels(spec.data))
    for group in ("sources", "validation_sources"):
        # A label that was made from the path and one that says the same are alike; a weight can change any day.
        data[group] = [
            {name: value for name, value in source.items() if name != "weight"} | {"label": next(labels)}
            for source in data[group]
        ]
    sections = {"tokenizer": spec.tokenizer.model_dump(mode="json"), "data": data}
    return {f"{section}.{key}": value for section, fields in sections.items() for key, value in fields.items()}


def labelled_sources(spec: Spec) -> dict[str, Source]:
    """Every source by its label, in the order of the spec, those that are only validated on last."""
    return dict(zip(source_labels(spec.data), (*spec.data.sources, *spec.data.validation_sources), strict=True))


def open_sources(spec: Spec, *, skip_bad_lines: bool = False) -> dict[str, OpenSource]:
    """Every source, opened before anything is read, so that one that is missing is told at once.

    Those that are only validated on come first: of documents with the same text, the first is kept.
    """
    sources = labelled_sources(spec)
    validated_first = sorted(sources, key=lambda label: label not in list(sources)[len(spec.data.sources) :])
    return {label: open_source(sources[label], skip_bad_lines=skip_bad_lines) for label in validated_first}


def settle_recipe(
    spec: Spec, sources: Mapping[str, OpenSource], folder: Path, *, skip_bad_lines: bool = False
) -> Recipe:
    """Choose what is held out and make the tokenizer in `folder`, or take what an earlier attempt settled there.

    Raises DataError for sources that cannot be used, or do not suffice for the tokenizer; InputChangedError where an
    earlier attempt settled it on other text.
    """
    file, directory = folder / RECIPE_FILE, folder / TOKENIZER_DIRECTORY
    stamps = {label: source.stamp for label, source in sources.items()}
    if file.is_file():
        earlier = Recipe.model_validate_json(file.read_bytes())
        if earlier.stamps != stamps or earlier.tokenizer_files != folder_checksums(directory):
            raise InputChangedError
        return earlier
    threshold = held_out_threshold(spec, skip_bad_lines=skip_bad_lines)
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer = build_tokenizer(spec, directory, held_out_below=threshold, skip_bad_lines=skip_bad_lines)
    recipe = Recipe(
        threshold=threshold,
        vocab_size=token_count(tokenizer),
        end_of_text_id=tokenizer.eos_token_id,
        tokenizer_sha256=file_sha256(directory / TOKENIZER_FILE),
        tokenizer_files=folder_checksums(directory),
        stamps=stamps,
    )
    _sync(directory)  # the recipe vouches for it
    write_durably(file, recipe.model_dump_json().encode())
    return recipe


def _sync(directory: Path) -> None:
    """Wait until the files of the folder are on the disk."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def held_out_threshold(spec: Spec, *, skip_bad_lines: bool = False) -> int:
    """Documents of the spec's training sources whose `key_number` is below it are held out."""
    return validation_threshold(spec.data.validation_fraction, _training_keys(spec, skip_bad_lines))


def _training_keys(spec: Spec, skip_bad_lines: bool) -> Iterator[bytes]:
    """Keys of the training sources' documents, in order."""
    dropped = Dropped()
    for source in spec.data.sources:
        for piece in open_source(source, skip_bad_lines=skip_bad_lines).pieces(lambda name: None):
            for document in kept_documents(piece, spec.data.min_document_characters, dropped):
                yield document.key
