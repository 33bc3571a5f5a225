"""A model and DeepSpeed's JSON become a DeepSpeed engine."""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator

from dsllm.engine.optimizer import own_optimizer, parameter_groups
from dsllm.engine.ranks import device_type
from dsllm.errors import UserError
from dsllm.model.build import (
    DTYPES,
    build_model,
    compile_blocks,
    enable_activation_checkpointing,
    model_config,
)
from dsllm.model.initialize import initialize_weights
from dsllm.model.loss import TrainingModel, fused_loss_is_installed
from dsllm.model.suitability import check_suitable
from dsllm.plan.workload import CHECKPOINTED_BLOCKS, LossImplementation
from dsllm.spec.sections import Precision, Spec


def start_engine(spec: Spec, ds_config: dict[str, Any]) -> DeepSpeedEngine:
    """The initialised model of `spec` under DeepSpeed; collective, on every rank.

    Raises UserError where the device cannot compute in the spec's precision, or dsllm cannot train the model type.
    """
    check_precision(spec.training.precision)
    config = model_config(spec)
    if spec.model.family == "auto":
        check_suitable(config, spec.zero.stage, spec.data.mask_documents)
    partitioned = ds_config if spec.zero.stage == 3 else None
    causal_lm = build_model(config, DTYPES[spec.training.precision], partitioned)
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
    _skip_at_the_lowest_scale(engine)
    return engine


def _skip_at_the_lowest_scale(engine: DeepSpeedEngine) -> None:
    """In fp16 DeepSpeed ends the run at the first overflow that no lower loss scale can mend; here such steps count
    towards guards.nonfinite_limit, as they do in every precision."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def loss_implementation(spec: Spec) -> LossImplementation:
    """`auto` is fused where liger-kernel can run."""
    if spec.training.loss != "auto":
        return spec.training.loss
    return "fused" if device_type() == "cuda" and fused_loss_is_installed() else "chunked"


def check_precision(precision: Precision) -> None:
    """Raises UserError where this device, or this CPU, has no arithmetic of that type: bf16 on a V100, for one."""
    accelerator = get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported, "fp32": lambda: True}
    if not supported[precision]():
        others = " or ".join(name for name, is_supported in supported.items() if is_supported())
        raise UserError(
            f"training.precision: given {precision}, in which this {accelerator.device_name()} cannot compute; "
            f"set it to {others}"
        )
