"""Whether the weights of an existing model mean the same in the network of a spec: its configuration, key by key."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from dsllm.errors import SpecError
from dsllm.spec.sections import AnyModel

SPEC_FIELDS = {
    "num_hidden_layers": "num_layers",
    "n_layer": "num_layers",
    "hidden_size": "hidden_size",
    "n_embd": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "n_head": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_size",
    "intermediate_size": "intermediate_size",
    "n_inner": "intermediate_size",
    "rms_norm_eps": "norm_epsilon",
    "layer_norm_epsilon": "norm_epsilon",
    "sliding_window": "sliding_window",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""Keys of transformers' configurations, and the field of the spec that sets each."""
ANOTHER_MATTER = {
    "vocab_size", "max_position_embeddings", "n_positions", "n_ctx", 
    "use_cache", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "reorder_and_upcast_attn",
    "use_sliding_window", "max_window_layers",
}  # fmt: skip
"""Keys that do not say what a layer computes, are compared elsewhere, or are said by others: which layers have a window
by `layer_types`."""
ANOTHER_MATTER_PARTS = ("dropout", "pdrop", "summary_")
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")
"""One formula: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""


def refuse_another_network(model: AnyModel, ours: PretrainedConfig, source: PretrainedConfig, name: str) -> None:
    """Raises SpecError, with every difference, both values and the remedy, where layers of `ours`, the configuration of
    the spec's network, compute something else than those of `source`, that of the model `name`."""
    if ours.model_type != source.model_type:
        known = type(model).model_fields["family"].annotation
        is_named = model.family != "auto" and source.model_type in getattr(known, "__args__", ())
        remedy = f"set model.family to {source.model_type if is_named else 'auto'}"
        problems = [f"model.family: given {ours.model_type}; {name} is of family {source.model_type}; {remedy}"]
    else:
        theirs = _meaning(source)
        problems = [
            _difference(model, key, value, theirs.get(key), name)
            for key, value in _meaning(ours).items()
            if value != theirs.get(key)
        ]
    if problems:
        raise SpecError(problems, f"model.init.name: {name} is another network")


def _meaning(config: PretrainedConfig) -> dict[str, Any]:
    """Every key that says what a layer computes, in one form of the many that a file may have."""
    everything = PretrainedConfig().to_dict()
    keys = {
        key: value
        for key, value in config.to_dict().items()
        if key not in everything and key not in ANOTHER_MATTER and not any(part in key for part in ANOTHER_MATTER_PARTS)
    }
    return {key: _in_one_form(key, value, config) for key, value in keys.items()}


def _in_one_form(key: str, value: Any, config: PretrainedConfig) -> Any:
    if value in TANH_GELUS:
        return TANH_GELUS[0]
    if key == "n_inner":
        return value or 4 * config.hidden_size
    if key == "num_key_value_heads":
        return value or config.num_attention_heads
    if key == "head_dim":
        return value or config.hidden_size // config.num_attention_heads
    if key == "rope_parameters" and isinstance(value, dict) and value.get("rope_type", "default") == "default":
        return {"rope_theta": value.get("rope_theta")}
    return value


def _difference(model: AnyModel, key: str, ours: Any, theirs: Any, name: str) -> str:
    if model.family == "auto":
        return f"model.config: {key} is {ours}; {name} has {theirs}; leave model.config out to take that of {name}"
    field = SPEC_FIELDS.get(key)
    if key == "rope_parameters" and _only_theta(ours) and _only_theta(theirs):
        field, ours, theirs = "rope_theta", ours["rope_theta"], theirs["rope_theta"]
    if field is None:
        return f"model.family: {model.family} has {key} {ours}; {name} has {theirs}; set model.family to auto"
    ours, theirs = (str(value).lower() if isinstance(value, bool) else value for value in (ours, theirs))
    remedy = f"set it to {theirs}"
    if field == "num_layers":
        remedy += ", or list the layers to take in model.init.layers"
    return f"model.{field}: given {ours}; {name} has {theirs}; {remedy}"


def _only_theta(rope: Any) -> bool:
    return isinstance(rope, dict) and rope.keys() == {"rope_theta"}
