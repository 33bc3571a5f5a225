"""How long a text a model can read."""

from __future__ import annotations

from transformers import PretrainedConfig


def num_positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model of `config` reads at most; None where nothing limits it, as with ALiBi or recurrence."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
