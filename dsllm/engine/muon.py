"""Muon for the matrices of blocks, AdamW for everything else, in one optimizer under any ZeRO stage.

DeepSpeed has a Muon of its own (0.19.8, runtime/zero/muon), which is not used: but in bf16 at stage 1 it clips what is
already orthogonal, so that clipping at 1 divides the learning rate by the root of the number of directions, and takes
that for the gradient's norm; its momentum is bf16 at stages 2 and 3. See docs/optimizers.md. Here gradients arrive
reduced, unscaled and clipped, as AdamW's do; momentum is fp32 and lies beside the master weights, element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import nn
from transformers.pytorch_utils import Conv1D

from dsllm.engine import ranks
from dsllm.engine.fragments import layout_of, shapes_of
from dsllm.engine.matrices import Division, Matrix, divide
from dsllm.model.loss import LossHead
from dsllm.plan.muon import NEWTON_SCHULZ_STEPS

MOMENTUM = "momentum_buffer"
"""Muon's one moment, by the name that torch and DeepSpeed have for it."""

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of a quintic that takes singular values to between 0.7 and 1.2 in five steps, the small ones fast."""


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but groups that have a `momentum` are stepped by Muon once `bind` has said where their matrices lie."""

    divisions: dict[torch.Tensor, Division]
    dtype: torch.dtype
    """Of the arithmetic that orthogonalises."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters of all groups; collective where matrices are cut among ranks."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for master in group["params"] if "momentum" in group else ():
                self._step_matrices(master, group)
        return loss

    @torch.no_grad()
    def _step_matrices(self, master: torch.Tensor, group: dict[str, Any]) -> None:
        """Nesterov momentum element by element, an orthogonal update matrix by matrix; weight decay as AdamW's."""
        if master.grad is None:
            return
        state, beta, rate = self.state[master], group["momentum"], group["lr"]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(master, dtype=torch.float32)
        state[MOMENTUM].lerp_(master.grad, 1 - beta)
        direction = master.grad.lerp_(state[MOMENTUM], beta).view(-1)  # in place: the gradient has served
        flat = master.view(-1).mul_(1 - rate * group["weight_decay"])
        for piece, update in self.divisions[master].run(direction, _update, self.dtype, ranks.device()):
            place = flat.narrow(0, piece.flat_start, piece.numel)
            place.add_(update.to(place.device), alpha=-rate)


def bind(optimizer: MuonAdamW, engine: DeepSpeedEngine) -> None:
    """Tell the optimizer of an engine where its matrices lie. Collective."""
    layout, scales = layout_of(engine), matrix_scales(engine.module)
    is_cut = layout.nesting not in ("whole", "flat_stage_0")  # at stage 0 every rank has all, and updates all
    fragments = ranks.gather(layout.fragments) if is_cut else [layout.fragments]
    shapes = list(shapes_of(engine).values())
    of_place = {place: scales[p] for place, p in enumerate(engine.param_names) if p in scales}
    own = torch.distributed.get_rank() if is_cut else 0
    divisions = divide(fragments, {place: shapes[place] for place in of_place}, of_place, own)
    optimizer.divisions = {layout.masters[group]: division for group, division in divisions.items()}
    optimizer.dtype = _arithmetic(next(engine.module.parameters()).dtype)


def matrix_scales(model: nn.Module) -> dict[nn.Parameter, float]:
    """Muon's parameters: matrices, but those that look tokens or positions up and the head, which AdamW has.

    With what their orthogonal updates are multiplied by, as Muon's author has it: the root of rows over columns where
    there are more rows, a row being an output. GPT-2's layers store a matrix the other way round.
    """
    looked_up = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding | LossHead)
        for parameter in module.parameters(recurse=False)
    }
    return {
        parameter: _scale(_shape(parameter), is_transposed=isinstance(module, Conv1D))
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if len(_shape(parameter)) >= 2 and parameter not in looked_up
    }


def orthogonalized(matrix: torch.Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> torch.Tensor:
    """The last two dimensions made nearly orthogonal: U S V' becomes U S* V', every S* between 0.7 and 1.2.

    Newton and Schulz's iteration with the coefficients of https://kellerjordan.github.io/posts/muon, in the type of
    `matrix`; further dimensions are a batch, such as stacked experts.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if is_tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


def _update(direction: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """In place; of stacked experts one at a time, so that copies are of one and not of all."""
    for one in direction.view(-1, *matrix.shape[-2:]):
        one.copy_(orthogonalized(one))
    return direction.mul_(matrix.scale)


def _scale(shape: Iterable[int], is_transposed: bool) -> float:
    rows, columns = tuple(shape)[-2:]
    outputs, inputs = (columns, rows) if is_transposed else (rows, columns)
    return math.sqrt(max(1.0, outputs / inputs))


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """ZeRO-3 leaves an empty vector in the place of a partitioned parameter and its true shape beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _arithmetic(weights: torch.dtype) -> torch.dtype:
    """bf16 is exact enough for an update that is approximate; fp32 where weights are, or where there is no bf16."""
    return torch.bfloat16 if weights != torch.float32 and ranks.has_bf16() else torch.float32
