"""Validation loss on a fixed set of samples, the same whatever the world size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from deepspeed import DeepSpeedEngine

from dsllm.engine import ranks
from dsllm.model.loss import IGNORED_LABEL


@torch.no_grad()
def validation_loss(engine: DeepSpeedEngine, micro_batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """Mean cross-entropy in nats a token over every rank's `micro_batches`; collective.

    Every rank must bring as many micro-batches as the others, because ZeRO-3 gathers weights in each forward.
    """
    device = ranks.device()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    engine.eval()
    for micro_batch in micro_batches:
        batch = {name: tensor.to(device) for name, tensor in micro_batch.items()}
        loss = engine(**batch)
        tokens = (batch["labels"] != IGNORED_LABEL).sum()
        # A micro-batch of nothing but padding has no mean; it counts for nothing.
        sums += torch.stack([torch.where(tokens > 0, loss * tokens, 0.0), tokens.to(loss.dtype)])
    engine.train()
    total, tokens = ranks.sum_over_ranks(sums).tolist()
    return total / tokens
