"""How long a text a model can read."""

from __future__ import annotations

from transformers import PretrainedConfig

NAMES = ("max_position_embeddings", "max_seq_len")
"""What configurations call it: nearly all the first, if only as another name for their own; MPT and DBRX the second."""


def num_positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model of `config` reads at most; None where nothing limits it, as in BLOOM or Mamba."""
    text_config = config.get_text_config(decoder=True)
    return next((number for name in NAMES if (number := getattr(text_config, name, None)) is not None), None)
