"""A model and DeepSpeed's JSON become a DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed import DeepSpeedEngine

from dsllm.engine.optimizer import own_optimizer, parameter_groups
from dsllm.model.build import (
    DTYPES,
    build_model,
    compile_blocks,
    enable_activation_checkpointing,
    model_config,
)
from dsllm.model.initialize import initialize_weights
from dsllm.model.loss import TrainingModel, fused_loss_is_available
from dsllm.spec.sections import Spec

CHECKPOINTED_BLOCKS = {"selective": 2, "full": 1}
"""Every how many blocks activations are computed again."""


def start_engine(spec: Spec, ds_config: dict[str, Any]) -> DeepSpeedEngine:
    """The initialised model of `spec` under DeepSpeed; collective, on every rank."""
    partitioned = ds_config if spec.zero.stage == 3 else None
    causal_lm = build_model(model_config(spec), DTYPES[spec.training.precision], partitioned)
    initialize_weights(causal_lm, spec.seed)
    if spec.training.activation_checkpointing != "none":
        enable_activation_checkpointing(causal_lm, CHECKPOINTED_BLOCKS[spec.training.activation_checkpointing])
    if spec.training.compile:
        compile_blocks(causal_lm)
    model = TrainingModel(causal_lm, loss_implementation(spec))
    groups = parameter_groups(model, spec.optimizer.weight_decay)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups, optimizer=own_optimizer(spec, groups), config=ds_config
    )
    return engine


def loss_implementation(spec: Spec) -> Any:
    """`auto` is fused where liger-kernel can run."""
    if spec.training.loss != "auto":
        return spec.training.loss
    return "fused" if fused_loss_is_available() else "chunked"
