"""Text from a trained model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dsllm.data.tokenizer import token_count
from dsllm.errors import DsllmError, UserError
from dsllm.model.positions import num_positions
from dsllm.model.text_stream import TextStream

OnText = Callable[[int, str, bool], None]
"""Hears text as it is written: the number of the sample, from 0, the piece, and whether it is the last."""


class Sampling(NamedTuple):
    """How tokens are chosen, and when they end."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int = 50
    """0 leaves the distribution whole."""
    top_p: float = 0.95
    """1 leaves the distribution whole."""
    stops: tuple[str, ...] = ()
    """Texts before which the model's text ends."""


class Continuation(NamedTuple):
    """What a model wrote behind its context."""

    text: str
    num_tokens: int


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids of a prompt, nothing added; of an empty one the end-of-text token, behind which documents start.

    Raises UserError for an empty prompt where the tokenizer has no such token.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    if not ids and tokenizer.eos_token_id is None:
        raise UserError(
            "--prompt: given none, and the tokenizer has no end-of-text token to begin with; give some text"
        )
    return ids or [tokenizer.eos_token_id]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    num_samples: int = 1,
    on_text: OnText = lambda sample, piece, is_last: None,
) -> list[Continuation]:
    """`num_samples` continuations of `context`, all at once; the same for the same seed.

    A text ends at the end-of-text token, before a stop text, or where the model's positions end. What `on_text` heard
    of a sample, joined, is its text. Raises UserError for a context that leaves no room, or several samples where all
    would be the same, DsllmError for weights that give no probabilities.
    """
    if sampling.temperature == 0 and num_samples > 1:
        raise UserError(f"--samples: given {num_samples} at --temperature 0, where all are the same; ask for 1")
    positions = num_positions(model.config)
    if positions is not None and len(context) >= positions:
        raise UserError(f"--prompt: given {len(context)} tokens; the model has {positions} positions; shorten it")
    torch.manual_seed(seed)
    streams = [TextStream(tokenizer, context, sampling.stops) for _ in range(num_samples)]
    ids = torch.tensor([context], device=model.device)
    end_ids = _end_ids(model, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, positions - len(context) if positions else sampling.max_new_tokens),
        num_return_sequences=num_samples,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=0,  # of samples that have ended: nobody reads it
        # Rows that only pad the vocabulary are no tokens.
        suppress_tokens=list(range(token_count(tokenizer), model.config.get_text_config().vocab_size)) or None,
        **_choice(sampling),
    )
    with _without_own_settings(model):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Soundness()]),
            stopping_criteria=StoppingCriteriaList([_Listener(streams, end_ids, on_text)]),
        )
    for sample, stream in enumerate(streams):
        if not stream.is_finished:
            on_text(sample, stream.finish(), True)
    return [Continuation(stream.text, stream.num_tokens) for stream in streams]


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model has no settings of its own, which transformers mixes with those that it is given: beams, or a
    penalty for what was said before."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _choice(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end a text: the tokenizer's, and those that the model's own settings name, as of a chat model."""
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own]
    return {token for token in [tokenizer.eos_token_id, *named] if token is not None}


class _Listener(StoppingCriteria):
    """Hears each token of each sample, and says which samples have ended."""

    def __init__(self, streams: Sequence[TextStream], end_ids: set[int], on_text: OnText) -> None:
        self._streams = streams
        self._end_ids = end_ids
        self._on_text = on_text

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        for sample, (stream, token) in enumerate(zip(self._streams, input_ids[:, -1].tolist(), strict=True)):
            if not stream.is_finished:
                piece = stream.finish() if token in self._end_ids else stream.push(token)
                self._on_text(sample, piece, stream.is_finished)
        return torch.tensor([stream.is_finished for stream in self._streams], device=input_ids.device)


class _Soundness(LogitsProcessor):
    """Refuses logits of which torch makes no probabilities; it says so in words about a tensor."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not (scores < math.inf).all():  # neither of NaN nor of infinity
            raise DsllmError("the model's logits are not finite: its weights were spoiled; take an earlier checkpoint")
        return scores
