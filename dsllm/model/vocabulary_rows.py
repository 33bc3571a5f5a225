"""Where the rows of a model's embedding and output projection come from, when it starts from another model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsllm.errors import UserError


@dataclass(frozen=True)
class VocabularyRows:
    """Rows of tokens that the source knows come from there; those of new tokens, and rows beyond the source's, are the
    mean of these; a row of the source's that no token uses stays what it was."""

    num_known: int
    """Tokens of the source."""
    num_tokens: int
    """Tokens of the run, which begin with those of the source."""
    num_source_rows: int
    num_rows: int
    """Of the model, its padding included."""

    @property
    def new(self) -> list[range]:
        """Rows that get the mean.

        Those of padding, without a token, take no more than one part in `num_known` each of what a row of a token has:
        the exponential of a mean logit is at most the mean of the exponentials.
        """
        first_lacking = max(self.num_source_rows, self.num_tokens)
        return [range(self.num_known, self.num_tokens), range(first_lacking, self.num_rows)]

    def fill(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        """Set `parameter`, (num_rows, width), from the source's `value`, (num_source_rows, width); the mean in fp32."""
        common = min(self.num_rows, self.num_source_rows)
        parameter[:common].copy_(value[:common])
        mean = value[: self.num_known].mean(0, dtype=torch.float32)
        for rows in self.new:
            parameter[rows.start : rows.stop].copy_(mean)


def vocabulary_rows(
    num_known: int | None, num_tokens: int, num_source_rows: int, num_rows: int, name: str
) -> VocabularyRows:
    """For a source `name` whose tokenizer has `num_known` tokens, None where it has no tokenizer.

    Raises UserError where the run has fewer tokens, or more than a source without a tokenizer has rows.
    """
    if num_known is None:
        if num_tokens > num_source_rows:
            raise UserError(
                f"model.vocab_size: given {num_tokens}; {name} has {num_source_rows} rows, and no tokenizer that would "
                "say of which tokens; put its tokenizer into its folder"
            )
        return VocabularyRows(num_tokens, num_tokens, num_source_rows, num_rows)
    num_known = min(num_known, num_source_rows)  # a tokenizer may have tokens that its model never got
    if num_known > num_tokens:
        raise UserError(
            f"model.vocab_size: given {num_tokens}; {name} knows {num_known} tokens, with which those of the run must "
            f"begin; set it to {num_known} or more"
        )
    return VocabularyRows(num_known, num_tokens, num_source_rows, num_rows)
