"""Which validation sets a model is evaluated on: those of a spec, or of a folder of tokens alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dsllm.data.prepare import default_directory
from dsllm.data.run_samples import open_validation_samples
from dsllm.data.samples import Samples
from dsllm.data.shards import TOKENIZER_DIRECTORY, read_manifest
from dsllm.data.token_ids import read_tokenizer
from dsllm.errors import UserError
from dsllm.evaluation.text_bytes import TextBytes, text_bytes
from dsllm.evaluation.validation import mix_shares, token_shares
from dsllm.spec.sections import Spec

USUAL_LENGTH = 1024
"""Of sequences, where neither a spec nor the model says how long they are."""


class ValidationSets(NamedTuple):
    """What a model is evaluated on."""

    directory: Path
    """Of the prepared tokens."""
    sequence_length: int
    samples: Mapping[str, Samples]
    """Of every set, by its label."""
    shares: Mapping[str, float]
    """What the sets count in one number: see `combined_loss`."""
    text_bytes: TextBytes | None
    """What counts the bytes of their text, where it can be counted."""

    def check_fit(self, source: Path, tokenizer: PreTrainedTokenizerBase, num_positions: int | None) -> None:
        """Raises UserError where the model of `source` has other tokens, or fewer positions."""
        prepared = read_tokenizer(self.directory / TOKENIZER_DIRECTORY).get_vocab(with_added_tokens=True)
        if prepared != tokenizer.get_vocab():
            raise UserError(
                f"{self.directory}: its tokens were made with another tokenizer than that of {source}; prepare the "
                f"text again, with {{kind: pretrained, name: {source}}} as the spec's tokenizer"
            )
        if num_positions is not None and self.sequence_length > num_positions:
            raise UserError(
                f"batch.sequence_length: given {self.sequence_length}; the model of {source} reads {num_positions} "
                f"tokens; shorten it with --set batch.sequence_length={num_positions}"
            )


def sets_of_spec(spec: Spec, directory: Path | None = None) -> ValidationSets:
    """The sets that training with `spec` is validated on; `directory` holds the prepared tokens where that is not the
    spec's own. Raises DataError where nothing is prepared, or nothing held out."""
    folder, length = directory or default_directory(spec), spec.batch.sequence_length
    samples = open_validation_samples(folder, spec.data, length)
    return ValidationSets(folder, length, samples, mix_shares(spec.data, read_manifest(folder)), _text_bytes(folder))


def sets_of_folder(directory: Path, sequence_length: int) -> ValidationSets:
    """Every source of a prepared folder that has documents to validate on, its stream cut wherever a sequence ends;
    what is held out counts by the tokens of its source. Raises DataError where nothing is prepared, or held out."""
    samples = open_validation_samples(directory, None, sequence_length)
    return ValidationSets(
        directory, sequence_length, samples, token_shares(read_manifest(directory)), _text_bytes(directory)
    )


def _text_bytes(directory: Path) -> TextBytes | None:
    tokenizer = read_tokenizer(directory / TOKENIZER_DIRECTORY)
    return text_bytes(tokenizer, read_manifest(directory).end_of_text_id)
