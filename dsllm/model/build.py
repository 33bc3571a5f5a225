"""From the spec's shape to a transformers model, whole or partitioned from birth (ZeRO-3)."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from dsllm.errors import UserError
from dsllm.model.configs import auto_config
from dsllm.model.families import NO_TOKENS, family_config
from dsllm.plan.model_shape import model_shape
from dsllm.spec.derived import written_config
from dsllm.spec.sections import Spec
from dsllm.units import round_up

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def model_config(spec: Spec) -> PretrainedConfig:
    """The transformers configuration of `spec.model`, its vocabulary padded.

    Raises UserError for an automatic one that transformers does not take.
    """
    model = spec.model
    if model.family == "auto":
        config = auto_config(written_config(model))
        config.vocab_size = round_up(spec.vocab_size, model.vocab_padding_multiple)
        for name, value in NO_TOKENS.items():
            setattr(config, name, value)
        _check_attention(config, model.attention)
    else:
        config = family_config(model, model_shape(spec))
    config._attn_implementation = model.attention
    config.use_cache = False
    return config


def _check_attention(config: PretrainedConfig, attention: str) -> None:
    if attention == "sdpa" and not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa:
        raise UserError(
            f"model.attention: given sdpa with model type {config.model_type}, which has only the plain kernel; "
            "set model.attention to eager"
        )


def build_model(
    config: PretrainedConfig, dtype: torch.dtype, ds_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """A causal language model whose weights are allocated but not yet set: see initialize.py.

    With `ds_config` (ZeRO-3) each parameter is partitioned over the ranks as it is created, so that no rank ever holds
    the whole model.
    """
    # Imported before zero.Init, which at its end puts back the __init__ that a class was defined with: of one that is
    # defined within, a decorator's would be lost, as that of MixtralExperts.
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_init_weights())
        if ds_config is not None:
            import deepspeed

            # The type comes from the JSON. Init's own `dtype` argument is ignored on devices without fp16 (0.19.8).
            stack.enter_context(deepspeed.zero.Init(config_dict_or_path=ds_config))
        model = model_class._from_config(config, dtype=dtype)
    # Skipping initialisation skips the tying of embedding and head too.
    model.tie_weights()
    restore_rotary_tables(model)
    return model


def restore_rotary_tables(model: PreTrainedModel) -> None:
    """Compute rotary frequencies again in fp32: zero.Init makes every new float tensor bf16, which is wrong by
    radians at position 1000. Some types have a table for each kind of layer, such as `full_attention_inv_freq`."""
    for module in model.modules():
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
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
