"""Attention within documents: which tokens of a packed sequence may see which."""

from __future__ import annotations

import math

import torch
from transformers import PretrainedConfig

from dsllm.plan.attention import MASK_ROW_MULTIPLE
from dsllm.units import round_up


def document_mask(position_ids: torch.Tensor, dtype: torch.dtype, sliding_window: int | None = None) -> torch.Tensor:
    """What is added to the scores of attention: 0 where a token sees another one of its own document, not later than
    itself, and minus infinity elsewhere; (sequences, 1, sequence_length, sequence_length) of `dtype`.

    `position_ids` (sequences, sequence_length) rise by 1 within a document and restart at 0 with the next. A token sees
    the last `sliding_window` ones, itself included; transformers leaves a mask that it is given as it is.

    transformers would find the documents in the positions by itself, but it reads the positions' values in every
    forward, which a GPU waits for, and makes a mask of truth values, of which torch makes one to add in every block and
    keeps it for backward. This one serves all blocks.
    """
    length = position_ids.shape[1]
    queries = torch.arange(length, device=position_ids.device)
    keys = torch.arange(round_up(length, MASK_ROW_MULTIPLE), device=position_ids.device)
    first_of_document = (queries - position_ids).unsqueeze(2)
    is_seen = (keys >= first_of_document) & (keys <= queries.unsqueeze(1))
    if sliding_window is not None:
        is_seen &= keys > queries.unsqueeze(1) - sliding_window
    mask = torch.full(is_seen.shape, -math.inf, dtype=dtype, device=position_ids.device)
    return mask.masked_fill_(is_seen, 0.0)[..., :length].unsqueeze(1)


def sliding_window(config: PretrainedConfig) -> int | None:
    """Tokens that every layer of the model looks back at most; None where layers see all. Some types keep the window in
    their configuration though no layer has it."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return None if kinds == {"full_attention"} else getattr(config, "sliding_window", None)
