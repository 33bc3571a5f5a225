"""Which of several endings a model finds likeliest, scored as lm-evaluation-harness scores multiple choice.

Its `loglikelihood` and `acc`, `acc_norm` (models/huggingface.py and api/task.py of 0.4.13): an ending is put behind its
context with a space between them; its log-likelihood is the sum over its tokens; `acc` takes the ending of the highest
one, `acc_norm` that of the highest one for each character of the ending. Of equal ones both take the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from dsllm.data.hellaswag import NUM_ENDINGS, Item
from dsllm.data.samples import IGNORED_LABEL
from dsllm.errors import DataError

USUAL_POSITIONS = 2048
"""Context of models that say nothing of it, as lm-evaluation-harness has it."""
LOGITS_BYTES = 2**27
"""Logits of one forward, at most, unless one item has more: they are whole here, where training's loss never has
more than a piece of them."""
_PADDED_TO = 32
"""Rows are filled up to a multiple of so many tokens: few shapes for kernels and compilers to meet."""


class EncodedItem(NamedTuple):
    """An item in tokens."""

    number: int
    """From 0, in the order of the items."""
    rows: tuple[tuple[list[int], int], ...]
    """Of each ending: the tokens of context and ending, at most one more than the model reads, and how many of them,
    the last ones, are the ending's."""
    length: int
    """Tokens in a row of the forward: what the model reads of the longest one, filled up."""
    characters: tuple[int, ...]
    """Of each ending, without the space before it."""
    label: int


class Dealt(NamedTuple):
    """A batch that a rank was given."""

    items: list[EncodedItem]
    counts: bool
    """Whether its answers count; otherwise another rank has it too."""


class Answers(NamedTuple):
    """What a model says to some items, in any order."""

    numbers: npt.NDArray[np.int64]
    """(items,)"""
    log_likelihoods: npt.NDArray[np.float64]
    """(items, endings)"""
    is_right: npt.NDArray[np.bool_]
    """(items,): by `acc`."""
    is_right_normalized: npt.NDArray[np.bool_]
    """(items,): by `acc_norm`."""


class Score(NamedTuple):
    """Shares of right answers."""

    acc: float
    acc_norm: float
    items: int

    def standard_error(self, share: float) -> float:
        """Of one of the shares: that of a mean of as many zeros and ones."""
        return math.sqrt(share * (1 - share) / (self.items - 1)) if self.items > 1 else math.nan


def encode(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, num_positions: int | None) -> list[EncodedItem]:
    """The items in tokens, for a model that reads `num_positions` at most. Longer contexts lose their beginning.

    Raises DataError for an ending that alone is longer, with the place of its item.
    """
    most = num_positions or USUAL_POSITIONS
    contexts = [item.context.rstrip() for item in items]
    # White space at a context's end belongs to the ending: vocabularies join it with the word behind it.
    texts = [f"{item.context} {ending}" for item in items for ending in item.endings]
    context_lengths = map(len, tokenizer(contexts)["input_ids"])
    token_ids = tokenizer(texts)["input_ids"]
    encoded = []
    for number, (item, context_length) in enumerate(zip(items, context_lengths, strict=True)):
        own = token_ids[number * NUM_ENDINGS : (number + 1) * NUM_ENDINGS]
        _check_lengths(item, [len(tokens) - context_length for tokens in own], most)
        rows = tuple((tokens[-(most + 1) :], len(tokens) - context_length) for tokens in own)
        longest = max(len(tokens) for tokens, _ in rows) - 1
        length = min(-(-longest // _PADDED_TO) * _PADDED_TO, most)
        encoded.append(EncodedItem(number, rows, length, tuple(map(len, item.endings)), item.label))
    return encoded


def batches(items: Sequence[EncodedItem], vocab_size: int, logit_bytes: int) -> list[list[EncodedItem]]:
    """Items of like length together, as many as LOGITS_BYTES allow for logits of `logit_bytes` each; the longest first.

    They do not depend on the number of ranks, so that a model's answers do not either.
    """
    cut: list[list[EncodedItem]] = []
    for item in sorted(items, key=lambda item: -item.length):
        if cut and (len(cut[-1]) + 1) * NUM_ENDINGS * cut[-1][0].length * vocab_size * logit_bytes <= LOGITS_BYTES:
            cut[-1].append(item)
        else:
            cut.append([item])
    return cut


def deal(batches: Sequence[list[EncodedItem]], rank: int, world_size: int) -> list[Dealt]:
    """The batches of a rank.

    All ranks get as many, because under ZeRO-3 all must take part in each forward; what is missing is the last batch,
    the shortest, again.
    """
    own = [Dealt(batch, True) for batch in batches[rank::world_size]]
    missing = -(-len(batches) // world_size) - len(own)
    return own + [Dealt(batches[-1], False)] * missing


@torch.no_grad()
def answer(logits_of: Callable[[torch.Tensor], torch.Tensor], dealt: Iterable[Dealt], device: torch.device) -> Answers:
    """What a model answers. `logits_of` takes token ids, (rows, length), and gives logits, (rows, length, vocabulary):
    a TrainingModel that evaluates, or an engine with one."""
    asked: list[EncodedItem] = []
    sums = [torch.empty(0, dtype=torch.float64, device=device)]
    for batch, counts in dealt:
        inputs, labels = rows_of(batch)
        own = _log_likelihoods(logits_of(inputs.to(device)), labels.to(device))
        if counts:
            asked += batch
            sums.append(own)
    # The one moment at which the host waits for the device.
    return _judged(asked, torch.cat(sums).cpu().numpy().reshape(-1, NUM_ENDINGS))


def rows_of(batch: Sequence[EncodedItem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of every ending, int64, (4 x items, length), filled up on the right, where nothing that counts
    sees it; only the tokens of endings are labels."""
    rows = [row for item in batch for row in item.rows]
    inputs = torch.zeros(len(rows), max(item.length for item in batch), dtype=torch.int64)
    labels = torch.full_like(inputs, IGNORED_LABEL)
    for row, (tokens, ending) in enumerate(rows):
        inputs[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        labels[row, len(tokens) - 1 - ending : len(tokens) - 1] = torch.tensor(tokens[len(tokens) - ending :])
    return inputs, labels


def score(right: float, right_normalized: float, items: float) -> Score:
    """From counts, of one process or summed over ranks."""
    return Score(right / items, right_normalized / items, round(items))


def _check_lengths(item: Item, endings: Sequence[int], most: int) -> None:
    for number, length in enumerate(endings, 1):
        if length > most:
            raise DataError(
                f"{item.place}: ending {number} is {length} tokens; the model reads {most} at most; leave the item "
                f"out, or take a model of more positions"
            )


def _log_likelihoods(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each row's labels; (rows,), fp64, in which equal terms add up to equal sums, wherever they stand. A row
    without any, whose ending merged into its context, has no chance."""
    losses = [
        cross_entropy(row.float(), row_labels, ignore_index=IGNORED_LABEL, reduction="none").double().sum()
        for row, row_labels in zip(logits, labels, strict=True)
    ]
    has_labels = (labels != IGNORED_LABEL).any(dim=1)
    return torch.where(has_labels, -torch.stack(losses), -torch.inf)


def _judged(items: Sequence[EncodedItem], log_likelihoods: npt.NDArray[np.float64]) -> Answers:
    characters = np.array([item.characters for item in items]).reshape(-1, NUM_ENDINGS)
    labels = np.array([item.label for item in items])
    # an ending that is nothing but brackets has no characters: it is never the likeliest
    normalized = np.where(characters > 0, log_likelihoods / np.maximum(characters, 1), -np.inf)
    return Answers(
        numbers=np.array([item.number for item in items], dtype=np.int64),
        log_likelihoods=log_likelihoods,
        is_right=log_likelihoods.argmax(axis=1) == labels,
        is_right_normalized=normalized.argmax(axis=1) == labels,
    )
