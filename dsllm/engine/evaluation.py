"""What a run asks its model at intervals: the same answers whatever the world size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from dsllm.data.loader import MicroBatch
from dsllm.engine import ranks
from dsllm.evaluation import choices
from dsllm.evaluation.validation import combined_loss, loss_and_tokens


def evaluate(
    engine: DeepSpeedEngine, sets: Mapping[str, Callable[[], Iterable[MicroBatch]]], shares: Mapping[str, float]
) -> dict[str, Any]:
    """What a step's record says of the validation sets: `val_loss`, in nats a token, and where there are several sets
    `val_losses`, the loss of each by its label; collective.

    Every rank must bring as many micro-batches as the others, because ZeRO-3 gathers weights in each forward. `shares`
    are those of the mix: see `combined_loss`.
    """
    engine.eval()
    sums = torch.stack([loss_and_tokens(engine, open_set(), ranks.device()) for open_set in sets.values()])
    engine.train()
    sums = ranks.sum_over_ranks(sums)
    tokens = dict(zip(sets, sums[:, 1].tolist(), strict=True))
    losses = dict(zip(sets, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
    record = {"val_loss": combined_loss(losses, tokens, shares)}
    return {**record, "val_losses": losses} if len(losses) > 1 else record


def ask_hellaswag(engine: DeepSpeedEngine, open_dealt: Callable[[], Iterable[choices.Dealt]]) -> dict[str, Any]:
    """What a step's record says of HellaSwag: `hellaswag_acc` and `hellaswag_acc_norm`, shares of right answers over
    all ranks; collective. `open_dealt` gives this rank's batches, as `choices.deal` deals them."""
    engine.eval()
    answers = choices.answer(engine, open_dealt(), ranks.device())
    engine.train()
    counts = [answers.is_right.sum(), answers.is_right_normalized.sum(), len(answers.numbers)]
    sums = ranks.sum_over_ranks(torch.tensor(counts, dtype=torch.float64, device=ranks.device()))
    score = choices.score(*sums.tolist())
    return {"hellaswag_acc": score.acc, "hellaswag_acc_norm": score.acc_norm}
