"""A model of the same type as another, small enough to look at: what the one does, and starts from, the other does."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dsllm.errors import UserError, first_line
from dsllm.model.families import NO_TOKENS

VOCAB_SIZE = 512
POSITIONS = 64
NUM_LAYERS = 2
HIDDEN_SIZE, NUM_HEADS, HEAD_SIZE = 64, 4, 16
PROBE_TOKENS = 8
SLIDING_WINDOW = 4
"""Shorter than what is looked at, so that there is something to leave out."""
MOST_PARAMETERS = 2**28
"""Of one that keeps its width: 1 GiB of fp32, on every rank."""
UNFIT = (StrictDataclassError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)
"""What transformers raises where sizes do not hang together."""


def narrowed(config: PretrainedConfig, vocab_size: int = VOCAB_SIZE, positions: int = POSITIONS) -> PretrainedConfig:
    """Two layers, 64 wide, where the type can be so; else two layers of its own width, or all of them. Nothing is
    dropped out.

    Raises UserError where none of these can be made, or is small.
    """
    vocabulary = {"vocab_size": vocab_size}
    shallow = {"num_hidden_layers": NUM_LAYERS, **vocabulary}
    narrow = _changed(config, {**shallow, **_narrow_sizes(config, positions)})
    if narrow is not None and _runs(narrow):
        return narrow
    kinds = getattr(config, "layer_types", None)
    as_deep = {"layer_types": kinds[:NUM_LAYERS]} if kinds else {}
    of_own_width = _changed(config, {**shallow, **as_deep}) or _changed(config, vocabulary)
    if of_own_width is None or _num_parameters(of_own_width) > MOST_PARAMETERS:
        raise UserError(
            f"model.config: model type {config.model_type} cannot be shrunk to less than {MOST_PARAMETERS:,} "
            "parameters, for the checks that look at a small one; choose another model type, or a narrower one"
        )
    return of_own_width


def narrow_model(config: PretrainedConfig) -> PreTrainedModel:
    """The small one with the weights that transformers itself gives it, in fp32 on the CPU; always the same.

    Raises UserError where it cannot be built.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(narrowed(config), dtype=torch.float32).eval()
    except UNFIT as error:
        raise _unbuildable(config, error) from error


def _unbuildable(config: PretrainedConfig, error: Exception) -> UserError:
    return UserError(
        f"model.config: no model of type {config.model_type} can be built of it ({first_line(error)}); correct its "
        "sizes"
    )


def _num_parameters(config: PretrainedConfig) -> int:
    """Counted without memory. Raises UserError where no such model can be built."""
    try:
        with torch.device("meta"):
            return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    except UNFIT as error:
        raise _unbuildable(config, error) from error


def _narrow_sizes(config: PretrainedConfig, positions: int) -> dict[str, Any]:
    """Of what the configuration has, by transformers' common names."""
    has_groups = getattr(config, "num_key_value_heads", None) not in (
        None,
        getattr(config, "num_attention_heads", None),
    )
    enough = max(4, 2 * (getattr(config, "num_experts_per_tok", None) or 0))
    sizes = {
        "hidden_size": HIDDEN_SIZE,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS // 2 if has_groups else NUM_HEADS,
        "head_dim": HEAD_SIZE,
        "qk_rope_head_dim": HEAD_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "moe_intermediate_size": HIDDEN_SIZE,
        "num_local_experts": min(enough, getattr(config, "num_local_experts", None) or 0),
        "num_experts": min(enough, getattr(config, "num_experts", None) or 0),
        "sliding_window": SLIDING_WINDOW,
        "first_k_dense_replace": NUM_LAYERS - 1,
        "max_position_embeddings": positions,
    }
    return {name: size for name, size in sizes.items() if _can_be_set(config, name)}


def _can_be_set(config: PretrainedConfig, name: str) -> bool:
    is_derived = isinstance(getattr(type(config), name, None), property)
    return not is_derived and getattr(config, name, None) is not None


def _changed(config: PretrainedConfig, sizes: dict[str, Any]) -> PretrainedConfig | None:
    """With other sizes and without dropout; None where the type refuses them. What follows from sizes is left to follow
    again."""
    own_names = {config.attribute_map.get(name, name): size for name, size in sizes.items()}
    keys = {key: value for key, value in config.to_dict().items() if key != "layer_types"} | NO_TOKENS
    dropouts = {key: 0.0 for key, value in keys.items() if "drop" in key and isinstance(value, float)}
    try:
        changed = CONFIG_MAPPING[config.model_type].from_dict({**keys, **dropouts, **own_names})
    except UNFIT:
        return None
    changed._attn_implementation = config._attn_implementation
    changed._experts_implementation = config._experts_implementation
    return changed


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
