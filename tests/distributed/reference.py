"""Pre-training as a plain PyTorch loop: one process, fp32, no DeepSpeed and nothing of dsllm's. The engine is tested
against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ReferenceRun:
    """One number a step: the mean loss before the update, and the norm of the gradients before they are clipped."""

    losses: list[float]
    gradient_norms: list[float]


def train_reference(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    *,
    learning_rate: Callable[[int], float],
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    gradient_clipping: float,
    micro_batch_size: int,
    muon: MuonSettings | None = None,
) -> ReferenceRun:
    """Takes one AdamW step for each global batch, in place on `model` (a transformers causal LM); with `muon`, Muon's
    for the matrices of the blocks.

    A batch is `(input_ids, labels)`, both (global_batch_size, sequence_length) of int64; `labels[:, i]` is the token
    that follows `input_ids[:, i]`, or -100, which does not count. `learning_rate(step)` counts steps from 0. A clipping
    norm of 0 clips nothing.
    """
    hidden = _hidden_matrices(model) if muon else {}
    groups = _parameter_groups([p for p in model.parameters() if p not in hidden], weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate(0), betas=betas, eps=epsilon, fused=False)
    momenta = {parameter: torch.zeros_like(parameter) for parameter in hidden}
    model.train()
    losses, norms = [], []
    for step, (input_ids, labels) in enumerate(batches):
        losses.append(_accumulate_gradients(model, input_ids, labels, micro_batch_size))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clipping or float("inf"))))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        for parameter, is_transposed in hidden.items():
            rate = muon.rate_ratio * learning_rate(step)
            _muon_step(parameter, momenta[parameter], muon.momentum, rate, weight_decay, is_transposed)
        model.zero_grad()
    return ReferenceRun(losses, norms)


@dataclass(frozen=True)
class MuonSettings:
    rate_ratio: float
    """Its learning rate over AdamW's."""
    momentum: float


@torch.no_grad()
def _muon_step(
    parameter: torch.Tensor,
    momentum: torch.Tensor,
    beta: float,
    rate: float,
    weight_decay: float,
    is_transposed: bool,
) -> None:
    """As https://kellerjordan.github.io/posts/muon has it, in fp32: by the singular values themselves; of stacked
    experts each by itself."""
    momentum.mul_(beta).add_((1 - beta) * parameter.grad)
    direction = (1 - beta) * parameter.grad + beta * momentum
    size = torch.linalg.matrix_norm(direction, keepdim=True).clamp(min=1e-7)
    left, values, right = torch.linalg.svd(direction / size, full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    sides = tuple(parameter.shape[-2:])
    outputs, inputs = reversed(sides) if is_transposed else sides
    parameter.mul_(1 - rate * weight_decay)
    parameter.sub_(rate * math.sqrt(max(1.0, outputs / inputs)) * (left * values.unsqueeze(-2)) @ right)


def _hidden_matrices(model: torch.nn.Module) -> dict[torch.nn.Parameter, bool]:
    """The matrices of the blocks, and whether each is stored as inputs by outputs: GPT-2's are."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    matrices = [parameter for parameter in blocks.parameters() if parameter.ndim >= 2]
    return dict.fromkeys(matrices, hasattr(model, "transformer"))


def _parameter_groups(parameters: Sequence[torch.nn.Parameter], weight_decay: float) -> list[dict]:
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _accumulate_gradients(model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, size: int) -> float:
    """Adds the gradient of the global batch's mean loss, a micro-batch of `size` sequences at a time."""
    counted = int((labels != -100).sum())
    total = 0.0
    for micro_input_ids, micro_labels in zip(input_ids.split(size), labels.split(size), strict=True):
        logits = model(input_ids=micro_input_ids).logits
        loss = cross_entropy(logits.float().flatten(0, 1), micro_labels.flatten(), reduction="sum") / counted
        loss.backward()
        total += loss.item()
    return total
