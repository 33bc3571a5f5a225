"""Pre-training as a plain PyTorch loop: one process, fp32, no DeepSpeed and nothing of dsllm's. The engine is tested
against it."""

from __future__ import annotations

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
) -> ReferenceRun:
    """Takes one AdamW step for each global batch, in place on `model` (a transformers causal LM).

    A batch is `(input_ids, labels)`, both (global_batch_size, sequence_length) of int64; `labels[:, i]` is the token
    that follows `input_ids[:, i]`, or -100, which does not count. `learning_rate(step)` counts steps from 0. A clipping
    norm of 0 clips nothing.
    """
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, weight_decay), lr=learning_rate(0), betas=betas, eps=epsilon, fused=False
    )
    model.train()
    losses, norms = [], []
    for step, (input_ids, labels) in enumerate(batches):
        losses.append(_accumulate_gradients(model, input_ids, labels, micro_batch_size))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clipping or float("inf"))))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return ReferenceRun(losses, norms)


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
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
