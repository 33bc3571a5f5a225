"""Validation losses: what a model of any kind is worth on micro-batches, and several sets as one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from dsllm.data.loader import MicroBatch
from dsllm.data.samples import IGNORED_LABEL
from dsllm.data.shards import Manifest
from dsllm.evaluation.text_bytes import TextBytes
from dsllm.spec.derived import source_labels
from dsllm.spec.sections import Data


class SetLoss(NamedTuple):
    """What came of a validation set. Of several sets together, `tokens` and `text_bytes` are sums, and the rest is
    weighted as training weights it: see `combined_loss`."""

    loss: float
    """Nats a token: the mean of -ln(probability) over the counted tokens."""
    tokens: int
    text_bytes: int | None
    """UTF-8 bytes of the text that the counted tokens stand for; None where they are not known (see text_bytes.py)."""
    bytes_per_token: float | None

    @property
    def perplexity(self) -> float:
        """e to the loss: among how many equally likely tokens it is as hard to choose."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits, for each byte of text: it compares models of unlike vocabularies."""
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None


@torch.no_grad()
def loss_and_tokens(
    model: Callable[..., torch.Tensor], micro_batches: Iterable[MicroBatch], device: torch.device
) -> torch.Tensor:
    """Sum of the losses of the counted labels and their number; (2,), fp64, on `device`.

    `model` is a TrainingModel that evaluates, or an engine with one.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    as_sum = torch.ones((), device=device)  # a loss divided by 1
    for micro_batch in micro_batches:
        batch = {name: tensor.to(device) for name, tensor in micro_batch.items()}
        loss = model(**{**batch, "loss_tokens": as_sum})
        sums += torch.stack([loss, (batch["labels"] != IGNORED_LABEL).sum().to(loss.dtype)])
    return sums


def set_loss(
    model: Callable[..., torch.Tensor],
    micro_batches: Iterable[MicroBatch],
    device: torch.device,
    text_bytes: TextBytes | None,
) -> SetLoss:
    """The loss of a whole set on this process alone, and the text that it was taken on."""
    counted_bytes = 0

    def counted() -> Iterable[MicroBatch]:
        nonlocal counted_bytes
        for micro_batch in micro_batches:
            if text_bytes is not None:
                counted_bytes += text_bytes.of(micro_batch["input_ids"].numpy(), micro_batch["labels"].numpy())
            yield micro_batch

    loss, tokens = loss_and_tokens(model, counted(), device).tolist()
    if text_bytes is None:
        return SetLoss(loss / tokens, round(tokens), None, None)
    return SetLoss(loss / tokens, round(tokens), counted_bytes, counted_bytes / tokens)


def mix_shares(data: Data, manifest: Manifest) -> dict[str, float]:
    """How much each source is trained on, relative to the others, by label: its weight, or else its tokens."""
    labels = source_labels(data)[: len(data.sources)]
    tokens = token_shares(manifest)
    return {
        label: source.weight if source.weight is not None else tokens[label]
        for label, source in zip(labels, data.sources, strict=True)
    }


def token_shares(manifest: Manifest) -> dict[str, float]:
    """Tokens of each prepared source to train on, by label; 0 of those that are only validated on."""
    streams = {source.label: source.streams.get("train") for source in manifest.sources}
    return {label: stream.tokens if stream else 0 for label, stream in streams.items()}


def combined_loss(losses: Mapping[str, float], tokens: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """One number for several sets: what is held out from the sources that the run trains on, each with its share, as an
    estimate of the loss on fresh text of the same mix. Sources that are only validated on count where nothing is held
    out, by the tokens evaluated.
    """
    held_out = {label: shares[label] for label in losses if shares.get(label, 0) > 0}
    weights = held_out or tokens
    return sum(weight * losses[label] for label, weight in weights.items()) / sum(weights.values())


def combined(sets: Mapping[str, SetLoss], shares: Mapping[str, float]) -> SetLoss:
    """All sets as one, weighted as `combined_loss` has it: a token of the mix stands for so many bytes of text."""
    tokens = {label: float(each.tokens) for label, each in sets.items()}
    each_bytes = {label: each.bytes_per_token for label, each in sets.items() if each.bytes_per_token is not None}
    are_known = len(each_bytes) == len(sets)
    return SetLoss(
        loss=combined_loss({label: each.loss for label, each in sets.items()}, tokens, shares),
        tokens=sum(each.tokens for each in sets.values()),
        text_bytes=sum(each.text_bytes or 0 for each in sets.values()) if are_known else None,
        bytes_per_token=combined_loss(each_bytes, tokens, shares) if are_known else None,
    )
