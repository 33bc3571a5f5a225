"""Prompts continued token by token by a forward that knows no cache, as that of a model in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

NextLogits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From ids (sequences, length), padded at the right, and a place in each (sequences,): the logits behind those places,
(sequences, vocabulary)."""
Choose = Callable[[torch.Tensor, Sequence[int]], list[int]]
"""A token for each row of logits, given the number of the prompt that each row belongs to."""
COLDEST = 1e-6
"""Temperature below which tokens are drawn as at this one: the quotient by it is still a number in fp32."""


def continue_prompts(
    prompts: Sequence[Sequence[int]],
    next_logits: NextLogits,
    choose: Choose,
    *,
    max_new_tokens: int,
    num_positions: int | None,
    end_id: int,
    at_once: int,
) -> list[list[int]]:
    """What follows each prompt, up to `max_new_tokens`, the model's positions, or `end_id`, which is left out.

    `at_once` prompts are read together, and each only as long as it goes on. Attention must be causal, so that what
    pads a sequence changes nothing before it.
    """
    rows = [list(prompt) for prompt in prompts]
    limits = [min(len(row) + max_new_tokens, num_positions or len(row) + max_new_tokens) for row in rows]
    for first in range(0, len(rows), at_once):
        going_on = list(range(first, min(first + at_once, len(rows))))
        while going_on := [number for number in going_on if len(rows[number]) < limits[number]]:
            ids, last = _padded([rows[number] for number in going_on], end_id)
            tokens = dict(zip(going_on, choose(next_logits(ids, last), going_on), strict=True))
            going_on = [number for number in going_on if tokens[number] != end_id]
            for number in going_on:
                rows[number].append(tokens[number])
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def choose_token(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """A token by `logits` (vocabulary,), on the CPU: the likeliest at `temperature` 0, else drawn from the `top_k`
    likeliest, all where that is 0.

    Logits that are no numbers give no text, but end no run either: the run's guards judge those.
    """
    logits = torch.nan_to_num(logits)
    if temperature == 0:
        return int(logits.argmax())
    likeliest, tokens = logits.topk(min(top_k, len(logits)) if top_k else len(logits))
    # Below the likeliest, which is 0, so that no quotient is larger than a number can be.
    below = torch.nan_to_num(likeliest - likeliest.max())
    probabilities = torch.softmax(below / max(temperature, COLDEST), dim=0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def _padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (sequences, length of the longest), and the last place of each, (sequences,)."""
    ids = torch.full((len(rows), max(map(len, rows))), filler)
    for row, sequence in zip(ids, rows, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids, torch.tensor([len(row) - 1 for row in rows])
