"""A model and DeepSpeed's JSON become a DeepSpeed engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator

from dsllm.engine import muon
from dsllm.engine.optimizer import own_optimizer, parameter_groups
from dsllm.engine.ranks import device_type, has_bf16
from dsllm.engine.starting_point import StartingPoint
from dsllm.errors import UserError
from dsllm.model.build import (
    DTYPES,
    build_model,
    compile_blocks,
    enable_activation_checkpointing,
    model_config,
)
from dsllm.model.initialize import initialize_weights
from dsllm.model.kernels import has_liger_kernels, liger_fault, liger_is_installed, use_liger_kernels
from dsllm.model.loss import TrainingModel
from dsllm.model.suitability import check_suitable
from dsllm.plan.workload import CHECKPOINTED_BLOCKS, LossImplementation
from dsllm.spec.sections import Precision, Spec

logger = logging.getLogger(__name__)

LIGER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families, by transformers' names, whose norms, rotary positions and gated layers all have fused kernels."""


def start_engine(spec: Spec, ds_config: dict[str, Any], start: StartingPoint | None = None) -> DeepSpeedEngine:
    """The model of `spec` under DeepSpeed, its weights those of `start`, or drawn at random; collective, on every rank.

    Raises UserError where the device cannot compute in the spec's precision or not with the kernels that it names, or
    dsllm cannot train the model type.
    """
    check_precision(spec.training.precision)
    for lost in lost_speed(spec):
        logger.warning("%s", lost)
    allow_tf32(spec.training.tf32)
    config = model_config(spec)
    if spec.model.family == "auto":
        check_suitable(config, spec.zero.stage, spec.data.mask_documents)
    partitioned = ds_config if spec.zero.stage == 3 else None
    causal_lm = build_model(config, DTYPES[spec.training.precision], partitioned)
    if start is not None:
        start.set_weights(causal_lm)
    else:
        initialize_weights(causal_lm, spec.seed)
    if kernels(spec, config.model_type) == "liger":
        use_liger_kernels(causal_lm)
    if spec.training.activation_checkpointing != "none":
        enable_activation_checkpointing(causal_lm, CHECKPOINTED_BLOCKS[spec.training.activation_checkpointing])
    if spec.training.compile:
        compile_blocks(causal_lm)
    model = TrainingModel(causal_lm, loss_implementation(spec))
    groups = parameter_groups(model, spec.optimizer)
    optimizer = own_optimizer(spec, groups)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, optimizer=optimizer, config=ds_config)
    if isinstance(optimizer, muon.MuonAdamW):
        muon.bind(optimizer, engine)
    _skip_at_the_lowest_scale(engine)
    return engine


def _skip_at_the_lowest_scale(engine: DeepSpeedEngine) -> None:
    """In fp16 DeepSpeed ends the run at the first overflow that no lower loss scale can mend; here such steps count
    towards guards.nonfinite_limit, as they do in every precision."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def lost_speed(spec: Spec) -> Iterator[str]:
    """What the spec allows or asks for and does not get, in a line each."""
    training = spec.training
    is_automatic = "auto" in (training.kernels, training.loss)
    if is_automatic and device_type() == "cuda" and liger_is_installed() and liger_fault() is not None:
        yield f"liger-kernel is installed and cannot be imported ({liger_fault()}): torch's kernels take its place"
    if training.compile and spec.zero.stage == 3:
        # forward and backward hooks of every module with parameters, which dynamo does not trace (parameter_offload.py)
        yield (
            "training.compile: true with zero.stage 3, whose hooks cut each block into pieces, so that little is "
            "fused; set it to false, or take a lower stage"
        )


def loss_implementation(spec: Spec) -> LossImplementation:
    """`auto` is fused where liger-kernel can run. Raises UserError where the spec names it and it cannot."""
    if spec.training.loss == "fused":
        _check_liger("training.loss: given fused", "chunked")
    if spec.training.loss != "auto":
        return spec.training.loss
    return "fused" if _can_run_liger() else "chunked"


def kernels(spec: Spec, model_type: str) -> Literal["liger", "torch"]:
    """Whose kernels the model gets; `model_type` is transformers' name of its family. `auto` is liger-kernel for the
    families that it was chosen for, where it can run and blocks are not compiled, which fuses as much.

    Raises UserError where the spec names liger-kernel and it cannot run, or has none for the family.
    """
    wanted = spec.training.kernels
    if wanted == "auto":
        is_wanted = model_type in LIGER_FAMILIES and not spec.training.compile
        return "liger" if is_wanted and _can_run_liger() else "torch"
    if wanted == "liger":
        _check_liger("training.kernels: given liger", "torch")
        if not has_liger_kernels(model_type):
            raise UserError(
                f"training.kernels: given liger, which has none for the family {model_type}; set it to auto or torch"
            )
    return wanted


def _can_run_liger() -> bool:
    return device_type() == "cuda" and liger_is_installed() and liger_fault() is None


def _check_liger(given: str, remedy: str) -> None:
    if device_type() != "cuda":
        raise UserError(f"{given}, whose kernels need a CUDA GPU, and this is a CPU; set it to auto or {remedy}")
    if not liger_is_installed():
        raise UserError(f"{given}, which needs liger-kernel; pip install liger-kernel, or set it to auto or {remedy}")
    if liger_fault() is not None:
        raise UserError(
            f"{given}, and the installed liger-kernel cannot be imported ({liger_fault()}); mend its "
            f"installation, or set it to auto or {remedy}"
        )


def allow_tf32(is_allowed: bool) -> None:
    """Whether CUDA may round the inputs of fp32 matrix products to TF32, from now on. On a CPU the same switch of
    torch's would choose other arithmetic, and is left alone."""
    if device_type() == "cuda":
        torch.set_float32_matmul_precision("high" if is_allowed else "highest")


def check_precision(precision: Precision) -> None:
    """Raises UserError where this device, or this CPU, has no arithmetic of that type: bf16 on a V100, for one."""
    accelerator = get_accelerator()
    supported = {"bf16": has_bf16, "fp16": accelerator.is_fp16_supported, "fp32": lambda: True}
    if not supported[precision]():
        others = " or ".join(name for name, is_supported in supported.items() if is_supported())
        raise UserError(
            f"training.precision: given {precision}, in which this {accelerator.device_name()} cannot compute; "
            f"set it to {others}"
        )
