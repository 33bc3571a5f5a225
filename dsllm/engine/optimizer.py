"""The optimizer's parameter groups, and stage 0, where DeepSpeed needs to be handed the optimizer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.ops.adam import FusedAdam

from dsllm.engine.muon import MuonAdamW, matrix_scales
from dsllm.spec.sections import Optimizer, Spec

ParameterGroups = list[dict[str, Any]]


class FlatAdamW(torch.optim.AdamW, FusedAdam):
    """torch's fused AdamW, in the clothes of DeepSpeed's FusedAdam.

    In half precision at stage 0 DeepSpeed keeps flat fp32 weights for an optimizer that is a FusedAdam, and steps
    tensor by tensor, three times slower, for any other. Its own FusedAdam is compiled at the first start, for which
    many machines lack a compiler; nothing but the class is asked for (runtime/engine.py, _configure_fp16_optimizer).
    """

    set_grad_none = True  # read by FusedAdam.zero_grad, which comes before torch's in the order of classes
    has_begun = False

    def step(self, closure: Any = None) -> Any:
        """Does nothing the first time, when DeepSpeed steps on zero gradients to have the states made.

        That step would decay the fp32 weights once more than the run does, and put Adam's bias correction a step
        ahead (runtime/fp16/fused_optimizer.py, initialize_optimizer_states). The states are made by the first real one.
        """
        if not self.has_begun:
            self.has_begun = True
            return None
        return super().step(closure)


class SkippingAdamW(torch.optim.AdamW):
    """torch's AdamW, which leaves out the step where `overflow` says that its gradients are not finite.

    In fp32 at stage 0 DeepSpeed steps it as it is. Everywhere else its own optimizers look first, and tell the engine
    by an attribute of this name (runtime/engine.py, _take_model_step).
    """

    overflow = False

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters, or leave them as they are."""
        return None if self.overflow else super().step(closure)


class FlatMuon(FlatAdamW, MuonAdamW):
    """Muon beside AdamW where DeepSpeed keeps flat weights for a FusedAdam."""


class SkippingMuon(SkippingAdamW, MuonAdamW):
    """Muon beside AdamW where DeepSpeed looks at no gradient."""


KINDS = {
    ("adamw", "exact"): (SkippingAdamW, SkippingAdamW),
    ("adamw", "half"): (torch.optim.AdamW, FlatAdamW),
    ("muon", "exact"): (SkippingMuon, SkippingMuon),
    ("muon", "half"): (MuonAdamW, FlatMuon),
    ("muon", "sharded"): (MuonAdamW, MuonAdamW),
}
"""By name and place, which is stage 0 in fp32, stage 0 in half precision, or a stage above: the class that is
constructed, and the one that it then becomes, since FusedAdam's own constructor compiles."""


def parameter_groups(model: torch.nn.Module, settings: Optimizer) -> ParameterGroups:
    """Matrices, which are decayed, and vectors (biases and norms), which are not; before them Muon's own, if any."""
    # ZeRO-3 leaves an empty vector in the place of a partitioned parameter and its true shape beside it.
    shapes = {parameter: getattr(parameter, "ds_shape", parameter.shape) for parameter in model.parameters()}
    of_muon = matrix_scales(model) if settings.name == "muon" else {}
    matrices = [p for p, shape in shapes.items() if len(shape) >= 2 and p not in of_muon]
    groups: ParameterGroups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": [p for p, shape in shapes.items() if len(shape) < 2], "weight_decay": 0.0},
    ]
    if not of_muon:
        return groups
    muon = {
        "params": [p for p in shapes if p in of_muon],
        "weight_decay": settings.weight_decay,
        "momentum": settings.muon_momentum,
        "rate_ratio": settings.muon_learning_rate / settings.learning_rate,
    }
    return [muon, *groups]


def own_optimizer(spec: Spec, groups: ParameterGroups) -> torch.optim.Optimizer | None:
    """The optimizer to hand to DeepSpeed; None where DeepSpeed makes the right one from its JSON."""
    settings = spec.optimizer
    if spec.zero.stage > 0 and settings.name == "adamw":
        return None
    where = "sharded" if spec.zero.stage > 0 else "exact" if spec.training.precision == "fp32" else "half"
    made, becomes = KINDS[settings.name, where]
    optimizer = made(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=settings.fused,
        foreach=not settings.fused,
    )
    optimizer.__class__ = becomes
    return optimizer
