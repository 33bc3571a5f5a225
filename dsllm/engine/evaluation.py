"""Validation losses on fixed sets of samples, the same whatever the world size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from dsllm.data.loader import MicroBatch
from dsllm.data.samples import IGNORED_LABEL
from dsllm.data.shards import Manifest
from dsllm.engine import ranks
from dsllm.spec.derived import source_labels
from dsllm.spec.sections import Data


def evaluate(
    engine: DeepSpeedEngine, sets: Mapping[str, Callable[[], Iterable[MicroBatch]]], shares: Mapping[str, float]
) -> dict[str, Any]:
    """What a step's record says of the validation sets: `val_loss`, in nats a token, and where there are several sets
    `val_losses`, the loss of each by its label; collective.

    `shares` are those of the mix: see `combined_loss`.
    """
    sums = ranks.sum_over_ranks(torch.stack([_loss_and_tokens(engine, open_set()) for open_set in sets.values()]))
    tokens = dict(zip(sets, sums[:, 1].tolist(), strict=True))
    losses = dict(zip(sets, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
    record = {"val_loss": combined_loss(losses, tokens, shares)}
    return {**record, "val_losses": losses} if len(losses) > 1 else record


def mix_shares(data: Data, manifest: Manifest) -> dict[str, float]:
    """How much each source is trained on, relative to the others, by label: its weight, or else its tokens."""
    labels = source_labels(data)[: len(data.sources)]
    streams = [manifest.source(label).streams.get("train") for label in labels]
    return {
        label: source.weight if source.weight is not None else (stream.tokens if stream else 0)
        for label, source, stream in zip(labels, data.sources, streams, strict=True)
    }


def combined_loss(losses: Mapping[str, float], tokens: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """One number for several sets: what is held out from the sources that the run trains on, each with its share, as an
    estimate of the loss on fresh text of the same mix. Sources that are only validated on count where nothing is held
    out, by the tokens evaluated.
    """
    held_out = {label: shares[label] for label in losses if shares.get(label, 0) > 0}
    weights = held_out or tokens
    return sum(weight * losses[label] for label, weight in weights.items()) / sum(weights.values())


@torch.no_grad()
def _loss_and_tokens(engine: DeepSpeedEngine, micro_batches: Iterable[MicroBatch]) -> torch.Tensor:
    """Sum of this rank's losses and number of its counted labels; (2,), fp64.

    Every rank must bring as many micro-batches as the others, because ZeRO-3 gathers weights in each forward.
    """
    device = ranks.device()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    as_sum = torch.ones((), device=device)  # a loss divided by 1
    engine.eval()
    for micro_batch in micro_batches:
        batch = {name: tensor.to(device) for name, tensor in micro_batch.items()}
        loss = engine(**{**batch, "loss_tokens": as_sum})
        sums += torch.stack([loss, (batch["labels"] != IGNORED_LABEL).sum().to(loss.dtype)])
    engine.train()
    return sums
