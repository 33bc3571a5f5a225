"""The loss that keeps experts equally busy, beside cross-entropy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dsllm.model.configs import num_experts


@dataclass(frozen=True)
class Balance:
    """How a model's routers are kept in balance (Switch Transformer, arXiv:2101.03961, equations 4 to 6)."""

    weight: float
    """Of the balancing loss in the whole."""
    num_experts: int
    num_experts_per_token: int
    loss_of_rows: Callable[..., torch.Tensor]
    """transformers' own: of the router's logits, (rows, experts) for each layer."""

    def loss(self, router_logits: Sequence[torch.Tensor], num_sequences: int) -> torch.Tensor:
        """The mean over the sequences of each one's balancing loss; fp32, a scalar.

        `router_logits` are (tokens of the micro-batch, experts) for each layer. A micro-batch as a whole has another
        loss than its halves; one for each sequence is the same however the batch is dealt out to ranks and
        micro-batches. transformers takes the mean over all rows of all layers, so that these may come in one piece.
        """
        layers = torch.stack(tuple(router_logits)).unflatten(1, (num_sequences, -1))
        losses = [
            self.loss_of_rows((rows.flatten(0, 1),), self.num_experts, self.num_experts_per_token)
            for rows in layers.unbind(1)
        ]
        return torch.stack(losses).mean()


def balance_of(causal_lm: PreTrainedModel) -> Balance | None:
    """What the model's own configuration asks for; None for one without experts, or with a weight of 0."""
    config = causal_lm.config
    weight = getattr(config, "router_aux_loss_coef", 0.0)
    loss_of_rows = getattr(sys.modules[type(causal_lm).__module__], "load_balancing_loss_func", None)
    if not weight or loss_of_rows is None:
        return None
    return Balance(weight, num_experts(config), config.num_experts_per_tok, loss_of_rows)


def with_gradient_of(loss: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    """`loss`, to the bit, with the gradient of `loss + beside`: what is reported stays what it was."""
    joined: torch.Tensor = _Joined.apply(loss, beside)
    return joined


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient
