"""A configuration as Hugging Face writes it: its keys by their own names, for the model types that a formula knows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

LLAMA_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "n_inner": None,
        "n_positions": 1024,
        "tie_word_embeddings": True,
    },
    "llama": {**LLAMA_DEFAULTS, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **LLAMA_DEFAULTS,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        **LLAMA_DEFAULTS,
        "num_key_value_heads": 32,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        **LLAMA_DEFAULTS,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
    },
    "mixtral": {
        **LLAMA_DEFAULTS,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
"""What transformers 5.23 takes where a configuration leaves a key out."""

ALIASES: dict[str, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    "mixtral": {"num_experts": "num_local_experts"},
}
"""Common names that transformers reads too, with the type's own."""

NAMES_OF_OURS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers",),
    "head_size": ("head_dim",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_experts_per_token": ("num_experts_per_tok",),
    "balance_loss_weight": ("router_aux_loss_coef",),
    "norm_epsilon": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "dropout": ("resid_pdrop", "hidden_dropout", "attention_dropout"),
}
"""Fields of a spelled-out model, with what configurations call them."""

NAMED_OTHERWISE = ("num_layers", "head_size", "num_experts_per_token")
"""Of those, sizes that no type with a formula has by our name."""

MAY_BE_NULL = ("num_key_value_heads", "head_dim", "n_inner", "sliding_window")
READ_OF_EVERY_TYPE = ("max_position_embeddings", "n_positions", "vocab_size")


def known_keys(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The keys by the type's own names, defaults included; None for a type that no formula knows."""
    model_type = str(config.get("model_type"))
    if model_type not in DEFAULTS:
        return None
    aliases = ALIASES.get(model_type, {})
    by_alias = {aliases[key]: value for key, value in config.items() if key in aliases}
    return {**DEFAULTS[model_type], **by_alias, **config}


def wrong_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each key that is read here and cannot be what it says; others are left to transformers."""
    model_type = str(config.get("model_type"))
    own, aliases = DEFAULTS.get(model_type, {}), ALIASES.get(model_type, {})
    for key, value in config.items():
        wanted = _wanted(aliases.get(key, key), value, own)
        if wanted is not None:
            given = json.dumps(value, default=repr)
            yield f"model.config.{key}: given {given}; must be {wanted}; correct it, or leave it out"
        elif own and key in NAMED_OTHERWISE:
            yield f"model.config.{key}: no key of {model_type}; did you mean {NAMES_OF_OURS[key][0]}?"


def _wanted(name: str, value: object, own: Mapping[str, Any]) -> str | None:
    """What the key `name` must be, where `value` is not that; None where it is, or where it is not read."""
    if name == "layer_types":
        is_list = isinstance(value, list | tuple) and all(isinstance(kind, str) for kind in value)
        return None if value is None or is_list else "a list of names, one for each layer"
    if name == "tie_word_embeddings" and own:
        return None if isinstance(value, bool) else "true or false"
    if name not in own and name not in READ_OF_EVERY_TYPE:
        return None
    may_be_null = name in MAY_BE_NULL or name not in own
    return None if is_size(value) or (value is None and may_be_null) else "a positive whole number"


def is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
