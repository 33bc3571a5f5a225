"""transformers' configurations of the families that a spec spells out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dsllm.plan.model_shape import ModelShape
from dsllm.spec.sections import Model

NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""A family's own may not be in this vocabulary; the export sets the tokenizer's."""

GROUPED_EXPERTS = "grouped_mm"
"""transformers' way to multiply all experts in one kernel, whatever tokens chose. Its plain loop skips experts that no
token of the micro-batch took, for which the host waits for the device, and does other work on each rank."""


def family_config(model: Model, shape: ModelShape) -> PretrainedConfig:
    """The configuration of a spec's network, its vocabulary padded."""
    return CONFIGS[model.family](model, shape)


def _gpt2_config(model: Model, shape: ModelShape) -> PretrainedConfig:
    return GPT2Config(
        vocab_size=shape.padded_vocab_size,
        n_positions=model.max_position_embeddings,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_attention_heads,
        n_inner=shape.intermediate_size,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own formula in one kernel: its "gelu_new" keeps 5 tensors
        resid_pdrop=model.dropout,
        embd_pdrop=model.dropout,
        attn_pdrop=model.dropout,
        layer_norm_epsilon=model.norm_epsilon,
        initializer_range=model.initializer_range,
        tie_word_embeddings=model.tie_word_embeddings,
        **NO_TOKENS,
    )


def _rotary(model: Model, shape: ModelShape) -> dict[str, Any]:
    """What the families with rotary positions have in common."""
    return {
        "vocab_size": shape.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        **NO_TOKENS,
    }


def _llama_config(model: Model, shape: ModelShape) -> PretrainedConfig:
    return LlamaConfig(**_rotary(model, shape), head_dim=shape.head_size)


def _mistral_config(model: Model, shape: ModelShape) -> PretrainedConfig:
    return MistralConfig(**_rotary(model, shape), head_dim=shape.head_size, sliding_window=model.sliding_window)


def _qwen2_config(model: Model, shape: ModelShape) -> PretrainedConfig:
    return Qwen2Config(**_rotary(model, shape))


def _qwen3_config(model: Model, shape: ModelShape) -> PretrainedConfig:
    return Qwen3Config(**_rotary(model, shape), head_dim=shape.head_size)


def _mixtral_config(model: Model, shape: ModelShape) -> PretrainedConfig:
    config = MixtralConfig(
        **_rotary(model, shape),
        head_dim=shape.head_size,
        sliding_window=model.sliding_window,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.num_experts_per_token,
        router_aux_loss_coef=model.balance_loss_weight,
    )
    config._experts_implementation = GROUPED_EXPERTS
    return config


CONFIGS: dict[str, Callable[[Model, ModelShape], PretrainedConfig]] = {
    "gpt2": _gpt2_config,
    "llama": _llama_config,
    "mistral": _mistral_config,
    "qwen2": _qwen2_config,
    "qwen3": _qwen3_config,
    "mixtral": _mixtral_config,
}
