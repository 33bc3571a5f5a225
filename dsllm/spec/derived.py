"""What follows from a spec's fields alone, without files and without a world size."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsllm.spec.sections import Model, Tokenizer, Training

PRETRAINED_VOCAB_SIZES = {"gpt2": 50257}
"""Token counts of well-known pretrained tokenizers, so that predictions need no download."""


def tokenizer_vocab_size(tokenizer: Tokenizer) -> int | None:
    """Tokens of the tokenizer; None for a pretrained one whose size only its files tell."""
    if tokenizer.kind == "pretrained":
        return PRETRAINED_VOCAB_SIZES.get(tokenizer.name)
    return tokenizer.vocab_size


def vocab_size(model: Model, tokenizer: Tokenizer) -> int | None:
    """Tokens that the model knows, before padding; None where neither section tells."""
    return model.vocab_size or tokenizer_vocab_size(tokenizer)


def train_steps(training: Training, tokens_per_step: int) -> int:
    """Optimizer steps of the run: the first reached of `train_steps` and `tokens`, the last step rounded up."""
    limits = []
    if training.train_steps is not None:
        limits.append(training.train_steps)
    if training.tokens is not None:
        limits.append(-(-training.tokens // tokens_per_step))
    return min(limits)
