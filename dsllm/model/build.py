"""From the spec's shape to a transformers model, whole or partitioned from birth (ZeRO-3)."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from dsllm.plan.model_shape import model_shape
from dsllm.spec.sections import Model, Spec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def model_config(spec: Spec) -> PretrainedConfig:
    """The transformers configuration of `spec.model`, its vocabulary padded."""
    shape = model_shape(spec)
    builders = {"gpt2": _gpt2_config, "llama": _llama_config}
    config = builders[spec.model.family](spec.model, shape.padded_vocab_size, shape.intermediate_size)
    config._attn_implementation = spec.model.attention
    config.use_cache = False
    return config


def build_model(
    config: PretrainedConfig, dtype: torch.dtype, ds_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """A causal language model whose weights are allocated but not yet set: see initialize.py.

    With `ds_config` (ZeRO-3) each parameter is partitioned over the ranks as it is created, so that no rank ever holds
    the whole model.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_init_weights())
        if ds_config is not None:
            import deepspeed

            # The type comes from the JSON. Init's own `dtype` argument is ignored on devices without fp16 (0.19.8).
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=ds_config))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Skipping initialisation skips the tying of embedding and head too.
    model.tie_weights()
    restore_rotary_tables(model)
    return model


def restore_rotary_tables(model: PreTrainedModel) -> None:
    """Compute rotary frequencies again in fp32: zero.Init makes every new float tensor bf16, which is wrong by
    radians at position 1000."""
    for module in model.modules():
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            exact = type(module)(config=model.config)
            for name, table in exact.named_buffers():
                setattr(module, name, table.to(getattr(module, name).device))


def enable_activation_checkpointing(model: PreTrainedModel, every: int) -> None:
    """Compute every `every`-th block again in backward instead of keeping its activations.

    Non-reentrant, so that blocks whose inputs need no gradient are handled too.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks[::every]:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile block by block: blocks are alike, so one compilation serves them all."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()


def _gpt2_config(model: Model, vocab_size: int, intermediate_size: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=model.max_position_embeddings,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_attention_heads,
        n_inner=intermediate_size,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own formula in one kernel: its "gelu_new" keeps 5 tensors
        resid_pdrop=model.dropout,
        embd_pdrop=model.dropout,
        attn_pdrop=model.dropout,
        layer_norm_epsilon=model.norm_epsilon,
        initializer_range=model.initializer_range,
        tie_word_embeddings=model.tie_word_embeddings,
        bos_token_id=None,  # GPT-2's own 50256 may not be in this vocabulary; the export sets the tokenizer's
        eos_token_id=None,
    )


def _llama_config(model: Model, vocab_size: int, intermediate_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads or model.num_attention_heads,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        initializer_range=model.initializer_range,
        tie_word_embeddings=model.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
    )
