"""A step whose loss or gradients are not finite, and whose they were.

DeepSpeed leaves such a step out: gradients are reduced by then, and a NaN of one rank is everybody's. So the step is
computed a second time, from the same micro-batches and random states, with hooks that look at each rank's own gradients
before they are reduced. A sound step pays nothing for this but a reference to its micro-batches. DeepSpeed treats the
second computation as any other: it leaves the step out again, or takes it, where it is finite this time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from deepspeed import DeepSpeedEngine

from dsllm.engine import ranks

Outcome = Literal["skipped", "recovered", "spoiled"]
"""Left out, the weights as before; taken, because it was finite when it was computed again; or taken as it was."""

_WRAPPER = "causal_lm."  # the attribute of TrainingModel, in front of transformers' own names


@dataclass(frozen=True)
class Fault:
    """What was not finite in a step."""

    outcome: Outcome
    losses: tuple[int, ...] = ()
    """Ranks whose own loss was not."""
    gradients: dict[int, str] = field(default_factory=dict)
    """Ranks whose loss was finite and whose own gradients were not: the first such parameter in backward."""

    @property
    def ranks(self) -> list[int]:
        """Where it arose; empty where each rank's own numbers were finite, and only their sum was not."""
        return sorted({*self.losses, *self.gradients})

    def causes(self) -> list[str]:
        """For each such rank what it was, as `the loss of rank 1`."""
        losses = {rank: f"the loss of rank {rank}" for rank in self.losses}
        gradients = {rank: f"the gradient of {name} on rank {rank}" for rank, name in self.gradients.items()}
        return [{**gradients, **losses}[rank] for rank in self.ranks]


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """The loss, with gradients that are all NaN where it is not finite: an infinite loss may have finite ones.

    So DeepSpeed's look at the gradients, which all ranks share, decides about both, before the weights change.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def loss_scale_can_fall(engine: DeepSpeedEngine) -> bool:
    """Whether gradients may overflow as a matter of course: in fp16, while its dynamic scale is above its minimum."""
    optimizer = engine.optimizer
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is not None and scaler.dynamic:
        return bool(scaler.cur_scale > scaler.min_scale)
    scale = getattr(optimizer, "loss_scale_config", None)  # of stage 0
    return bool(scale is not None and scale.dynamic_loss_scale and scale.cur_scale > scale.min_loss_scale)


def forget_gradients(engine: DeepSpeedEngine) -> None:
    """After a step that was left out: let go of its gradients where DeepSpeed holds on to them, and would add the next
    ones to their NaN. That is in stage_1_and_2.py, step(), with the optimizer on the host and fp32 accumulation."""
    optimizer = engine.optimizer
    if getattr(optimizer, "cpu_offload", False):
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)


@contextlib.contextmanager
def own_gradients_watched(module: torch.nn.Module) -> Iterator[list[str]]:
    """Within, notes the parameters whose gradient on this rank is not finite, in the order of backward.

    A hook on a parameter runs before its gradient is accumulated, which is when DeepSpeed's own hooks reduce it.
    """
    found: list[str] = []

    def look_at(name: str, gradient: torch.Tensor) -> None:
        if not gradient.isfinite().all():
            found.append(name.removeprefix(_WRAPPER))

    handles = [
        parameter.register_hook(lambda gradient, name=name: look_at(name, gradient))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def located(outcome: Outcome, own_loss: float, own_gradients: Sequence[str]) -> Fault:
    """The fault, from what every rank found of its own; collective."""
    of_ranks = ranks.gather((math.isfinite(own_loss), next(iter(own_gradients), None)))
    return Fault(
        outcome,
        losses=tuple(rank for rank, (is_finite, _) in enumerate(of_ranks) if not is_finite),
        gradients={rank: name for rank, (is_finite, name) in enumerate(of_ranks) if is_finite and name is not None},
    )
