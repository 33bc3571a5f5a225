"""A model of the same type as another, small enough to look at: what the one does, and starts from, the other does."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dsllm.errors import UserError
from dsllm.model.families import NO_TOKENS

VOCAB_SIZE = 512
POSITIONS = 64
NUM_LAYERS = 2
HIDDEN_SIZE, NUM_HEADS, HEAD_SIZE = 64, 4, 16
PROBE_TOKENS = 8
UNFIT = (StrictDataclassError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError)
"""What transformers raises where sizes do not hang together."""


def narrowed(config: PretrainedConfig, vocab_size: int = VOCAB_SIZE, positions: int = POSITIONS) -> PretrainedConfig:
    """Two layers, 64 wide, where the type can be so; else two layers of its own width."""
    shallow = {"num_hidden_layers": NUM_LAYERS, "vocab_size": vocab_size}
    narrow = _changed(config, {**shallow, **_narrow_sizes(config, positions)})
    return narrow if narrow is not None and _runs(narrow) else _shallow(config, shallow)


def narrow_model(config: PretrainedConfig) -> PreTrainedModel:
    """The small one with the weights that transformers itself gives it, in fp32 on the CPU; always the same.

    Raises UserError where it cannot be built.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(narrowed(config), dtype=torch.float32).eval()
    except UNFIT as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.config: no model of type {config.model_type} can be built of it ({reason}); correct its sizes"
        ) from error


def _narrow_sizes(config: PretrainedConfig, positions: int) -> dict[str, Any]:
    """Of what the configuration has, by transformers' common names."""
    has_groups = getattr(config, "num_key_value_heads", None) not in (
        None,
        getattr(config, "num_attention_heads", None),
    )
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    sizes = {
        "hidden_size": HIDDEN_SIZE,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS // 2 if has_groups else NUM_HEADS,
        "head_dim": HEAD_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "moe_intermediate_size": HIDDEN_SIZE,
        "num_local_experts": max(4, chosen),
        "num_experts": max(4, chosen),
        "max_position_embeddings": positions,
    }
    return {name: size for name, size in sizes.items() if _can_be_set(config, name)}


def _can_be_set(config: PretrainedConfig, name: str) -> bool:
    is_derived = isinstance(getattr(type(config), name, None), property)
    return not is_derived and getattr(config, name, None) is not None


def _changed(config: PretrainedConfig, sizes: dict[str, Any]) -> PretrainedConfig | None:
    """With other sizes; None where the type refuses them. What follows from sizes is left to follow again."""
    own_names = {config.attribute_map.get(name, name): size for name, size in sizes.items()}
    keys = {key: value for key, value in config.to_dict().items() if key != "layer_types"} | NO_TOKENS
    try:
        changed = CONFIG_MAPPING[config.model_type].from_dict({**keys, **own_names})
    except UNFIT:
        return None
    changed._attn_implementation = config._attn_implementation
    changed._experts_implementation = config._experts_implementation
    return changed


def _shallow(config: PretrainedConfig, sizes: dict[str, Any]) -> PretrainedConfig:
    kinds = getattr(config, "layer_types", None)
    shallow = _changed(config, {**sizes, **({"layer_types": kinds[:NUM_LAYERS]} if kinds else {})})
    assert shallow is not None, "fewer layers suit every type"
    return shallow


def _runs(config: PretrainedConfig) -> bool:
    return _runs_as(config.model_type, json.dumps(config.to_dict(), sort_keys=True, default=str))


@functools.lru_cache
def _runs_as(model_type: str, keys: str) -> bool:
    """Whether such a model can be built and run: sizes that hang together in a way of the type's own may not fit."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(json.loads(keys)))
            model(input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long))
    except (*UNFIT, IndexError):
        return False
    return True
