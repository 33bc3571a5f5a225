"""Cross-entropy without a whole batch of logits.

A batch of 64 x 1024 tokens with 50,304 entries each is 13 GB of fp32 logits, several times the states of a 124M
model. Here the output projection and the loss are one operation over pieces of the sequence: logits of one piece
exist at a time, in forward only, and their gradients are taken there and then. Backward only scales them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import PreTrainedModel, masking_utils

from dsllm.data.samples import IGNORED_LABEL
from dsllm.model.balance import balance_of, with_gradient_of
from dsllm.model.document_mask import document_mask, sliding_window
from dsllm.model.replaced import replaced
from dsllm.plan.activations import CHUNK_LOGITS_BYTES, PRODUCT_BYTES
from dsllm.plan.workload import LossImplementation


class TrainingModel(nn.Module):
    """What DeepSpeed trains: a causal language model whose forward is its loss, or without labels its logits."""

    def __init__(self, causal_lm: PreTrainedModel, implementation: LossImplementation) -> None:
        super().__init__()
        causal_lm.set_output_embeddings(LossHead(causal_lm.get_output_embeddings(), implementation))
        self.causal_lm = causal_lm
        self.balance = balance_of(causal_lm)
        self.balance_loss: torch.Tensor | None = None
        """Of the last micro-batch that was trained on, its weight left out; None for a model without experts."""

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        loss_tokens: torch.Tensor | None = None,
        logits_at: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy in nats a token, fp32: the sum over the counted labels over `loss_tokens`, a scalar, or over
        their number where that is absent.

        `input_ids` and `labels` are (sequences, sequence_length); `labels` are already shifted, -100 is left out. With
        `position_ids`, of the same shape, attention stays within a document: see document_mask.py. Without `labels`
        the logits of every position, (sequences, sequence_length, padded vocabulary), or of one in each sequence, given
        by `logits_at` (sequences,): (sequences, padded vocabulary).

        In training, a model with experts has the balancing loss in its gradients: see balance.py.
        """
        balance = self.balance if self.training and labels is not None else None
        hidden, router_logits = self._hidden_states(input_ids, position_ids, balance is not None)
        if logits_at is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), logits_at]
        loss = self.causal_lm.get_output_embeddings()(hidden, labels, loss_tokens)
        if balance is None:
            return loss
        balance_loss = balance.loss(router_logits, len(input_ids))
        self.balance_loss = balance_loss.detach()
        return with_gradient_of(loss, balance.weight * balance_loss)

    def _hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, wants_routers: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Of the last block, normalised; and the logits of every block's router where they are wanted. In a function of
        its own, so that a mask which no kernel keeps for backward is gone before the loss."""
        extras: dict[str, Any] = {"output_router_logits": True} if wants_routers else {}
        if position_ids is not None:
            mask = document_mask(position_ids, self.causal_lm.dtype, sliding_window(self.causal_lm.config))
            extras |= {"position_ids": position_ids, "attention_mask": mask}
        with _unsearched_positions():
            output = self.causal_lm.base_model(input_ids=input_ids, use_cache=False, **extras)
        return output[0], output.router_logits if wants_routers else ()


def _unsearched_positions() -> contextlib.AbstractContextManager[None]:
    """Within, transformers does not look for packed documents in the positions, which it would read for that in every
    forward, and a GPU be waited for: without a mask of ours there are none."""
    return replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


class LossHead(nn.Module):
    """In the place of a model's output projection, with the same parameter under the same name.

    A module of its own because ZeRO-3 gathers a parameter for the module that owns it.
    """

    def __init__(self, projection: nn.Linear, implementation: LossImplementation) -> None:
        super().__init__()
        if projection.bias is not None:
            raise ValueError("an output projection with a bias has no chunked loss here")
        self.weight = projection.weight
        self.implementation = implementation

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None, loss_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`hidden` is (sequences, sequence_length, hidden_size), `labels` (sequences, sequence_length); `loss_tokens`
        is what the sum of the loss is divided by, the number of counted labels when absent. Logits without labels."""
        if labels is None:
            return functional.linear(hidden, self.weight)
        cross_entropy = {"plain": _plain_cross_entropy, "fused": _fused_cross_entropy, "chunked": chunked_cross_entropy}
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        if loss_tokens is None:
            # Of a micro-batch without a single one the loss is 0, and so are its gradients.
            loss_tokens = (labels != IGNORED_LABEL).sum().clamp(min=1)
        return cross_entropy[self.implementation](hidden, self.weight, labels, loss_tokens)


def chunked_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_tokens: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T` against `labels`, its sum divided by `loss_tokens`; equal to the plain one.

    `hidden` is (tokens, hidden_size), `weight` (vocabulary, hidden_size), `labels` (tokens,) with -100 left out, and
    `loss_tokens` a scalar.
    """
    wants_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, loss_tokens, wants_gradients)
    return loss


def _plain_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_tokens: torch.Tensor
) -> torch.Tensor:
    logits = functional.linear(hidden, weight).float()
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum") / loss_tokens


def _fused_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_tokens: torch.Tensor
) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    summed = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED_LABEL, reduction="sum", accum_dtype=torch.float32)
    return summed(weight, hidden, labels) / loss_tokens


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        loss_tokens: torch.Tensor,
        wants_gradients: bool,
    ) -> torch.Tensor:
        counted = labels != IGNORED_LABEL
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if wants_gradients else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if wants_gradients else None
        for piece in _pieces(len(hidden), weight.shape[0]):
            # In a function of its own, so that the logits of one piece are gone before the next makes its own.
            total += _piece_loss(
                hidden[piece],
                weight,
                labels[piece],
                counted[piece],
                hidden_gradient[piece] if wants_gradients else None,
                weight_gradient,
            )
        if wants_gradients:
            # Held until backward has passed: in bf16 half the bytes do. fp16 has not the range for a sum over tokens.
            held_dtype = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
            ctx.save_for_backward(hidden_gradient, weight_gradient.to(held_dtype), loss_tokens)
            ctx.weight_dtype = weight.dtype
        return total / loss_tokens

    @staticmethod
    def backward(ctx: Any, loss_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, weight_gradient, loss_tokens = ctx.saved_tensors
        scale = loss_gradient / loss_tokens
        hidden_gradient = (hidden_gradient * scale).to(hidden_gradient.dtype)
        return hidden_gradient, (weight_gradient * scale).to(ctx.weight_dtype), None, None, None


def _piece_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor,
    hidden_gradient: torch.Tensor | None,
    weight_gradient: torch.Tensor | None,
) -> torch.Tensor:
    """Sum of the loss over a piece of the tokens; its gradients are written and added where they are wanted."""
    logits = functional.linear(hidden, weight).float()
    log_probabilities = torch.log_softmax(logits, dim=-1, out=logits)
    loss = _negative_log_likelihood(log_probabilities, labels, counted)
    if hidden_gradient is not None and weight_gradient is not None:
        # Gradients of the *sum*, of order 1: divided by the number of tokens they would underflow in fp16.
        gradient = _logits_gradient(log_probabilities, labels, counted).to(weight.dtype)
        torch.mm(gradient, weight, out=hidden_gradient)
        _add_outer_product(weight_gradient, gradient, hidden)
    return loss


def _pieces(num_tokens: int, vocab_size: int) -> list[slice]:
    """Pieces of the tokens whose fp32 logits stay under CHUNK_LOGITS_BYTES; a token at least."""
    size = max(1, CHUNK_LOGITS_BYTES // (4 * vocab_size))
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _add_outer_product(weight_gradient: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """`weight_gradient += gradient.t() @ hidden`, some rows at a time, so that no second copy of the matrix exists.

    Shapes (vocabulary, hidden_size), (tokens, vocabulary) and (tokens, hidden_size); the sum is fp32.
    """
    rows = max(1, PRODUCT_BYTES // (hidden.element_size() * hidden.shape[1]))
    for first in range(0, len(weight_gradient), rows):
        sums, columns = weight_gradient[first : first + rows], gradient[:, first : first + rows]
        if sums.dtype == hidden.dtype:
            sums.addmm_(columns.t(), hidden)
        else:
            sums.add_(columns.t() @ hidden)


def _negative_log_likelihood(
    log_probabilities: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """Sum over the counted labels, fp32."""
    chosen = log_probabilities.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return -(chosen * counted).sum()


def _logits_gradient(log_probabilities: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """softmax - one_hot(labels), in the memory of `log_probabilities`; zero where the label is left out."""
    gradient = log_probabilities.exp_()
    rows = torch.arange(len(labels), device=labels.device)
    gradient[rows, labels.clamp(min=0)] -= 1.0
    return gradient.mul_(counted.unsqueeze(1))
