"""Bytes of the types that a run keeps its numbers in, and how its gradients add up."""

from __future__ import annotations

from dsllm.spec.sections import Precision, Spec

ELEMENT_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}


def accumulation_precision(spec: Spec) -> Precision:
    """Type in which gradients add up: fp32 unless told otherwise, but at stage 0 always the type of the weights."""
    given = spec.training.gradient_accumulation_precision
    if spec.zero.stage == 0:
        return spec.training.precision
    return "fp32" if given == "auto" else given


def runs_bf16_optimizer(spec: Spec) -> bool:
    """Whether DeepSpeed runs its BF16_Optimizer: stage 1, bf16 weights, fp32 gradients, nothing offloaded.

    Read in DeepSpeed 0.19.8, runtime/engine.py, _do_optimizer_sanity_check.
    """
    return (
        spec.zero.stage == 1
        and spec.training.precision == "bf16"
        and accumulation_precision(spec) == "fp32"
        and spec.zero.offload_optimizer == "none"
    )
