"""The sizes of a network from its configuration as Hugging Face writes it, for the model types that a formula knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsllm.spec.config_keys import known_keys

BEYOND_THE_FORMULAS = ("attention_bias", "mlp_bias", "add_cross_attention", "use_sliding_window")
"""Keys that, where they are set, make another network of a type than the formula has."""


def config_sizes(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `config` says of a ModelShape's fields, all but the vocabulary; None for a network that no formula has."""
    layers = set(config.get("layer_types") or ["full_attention"])
    if layers != {"full_attention"} or any(config.get(key) for key in BEYOND_THE_FORMULAS):
        return None
    keys = known_keys(config)
    if keys is None:
        return None
    return _gpt2_sizes(keys) if keys["model_type"] == "gpt2" else _llama_sizes(keys["model_type"], keys)


def _gpt2_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "family": "gpt2",
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "num_attention_heads": config["n_head"],
        "num_key_value_heads": config["n_head"],
        "head_size": config["n_embd"] // config["n_head"],
        "intermediate_size": config["n_inner"] or 4 * config["n_embd"],
        "max_position_embeddings": config["n_positions"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


def _llama_sizes(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    return {
        "family": family,
        "num_layers": config["num_hidden_layers"],
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": config["num_key_value_heads"] or heads,
        "head_size": config["head_dim"] or width // heads,
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "has_query_biases": family == "qwen2",
        "norms_queries": family == "qwen3",
        "num_experts": config["num_local_experts"] if family == "mixtral" else 0,
        "num_experts_per_token": config["num_experts_per_tok"] if family == "mixtral" else 0,
        "sliding_window": config["sliding_window"] if family in ("mistral", "mixtral") else None,
    }
