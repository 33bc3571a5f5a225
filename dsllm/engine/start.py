"""A model and DeepSpeed's JSON become a DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine

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
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(model, spec.optimizer.weight_decay), config=ds_config
    )
    return engine


def loss_implementation(spec: Spec) -> Any:
    """`auto` is fused where liger-kernel can run."""
    if spec.training.loss != "auto":
        return spec.training.loss
    return "fused" if fused_loss_is_available() else "chunked"


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices are decayed, vectors (biases and norms) are not."""
    # ZeRO-3 leaves an empty vector in the place of a partitioned parameter and its true shape beside it.
    shapes = {parameter: getattr(parameter, "ds_shape", parameter.shape) for parameter in model.parameters()}
    return [
        {"params": [p for p, shape in shapes.items() if len(shape) >= 2], "weight_decay": weight_decay},
        {"params": [p for p, shape in shapes.items() if len(shape) < 2], "weight_decay": 0.0},
    ]
