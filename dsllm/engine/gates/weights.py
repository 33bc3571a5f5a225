"""Whether the initial weights are what their initialiser says, on the run's own engine."""

from __future__ import annotations

import math
import time

import torch
from transformers import PreTrainedModel

from dsllm.engine import ranks
from dsllm.engine.gates.check import Check
from dsllm.model.gather import gathered
from dsllm.model.initialize import Distribution, initial_distribution

STANDARD_ERRORS = 6.0
"""Chance goes beyond once in 500 million tensors. From 7,200 elements on, a deviation that is wrong by a tenth lies at
least as far beyond: twice 6 / sqrt(2 x 7200) is 0.1."""
PIECE_ELEMENTS = 2**22
"""Looked at in fp32 at a time: 16 MiB."""


def check_weights(causal_lm: PreTrainedModel) -> Check:
    """Whether every parameter of an engine's model, before its first step, is what it was drawn from. Collective."""
    started = time.perf_counter()
    problems = {}
    for name, parameter in causal_lm.named_parameters():
        with gathered(parameter):
            problems[name] = deviation(parameter, initial_distribution(name, parameter.ndim, causal_lm.config))
    wrong = [f"{name} {problem}" for name, problem in problems.items() if problem is not None]
    on_any_rank = max(ranks.gather(wrong), key=len)
    return Check(
        name="weights",
        passed=not on_any_rank,
        expected=f"matrices of deviation {causal_lm.config.initializer_range:g}, less before the residual; biases 0, "
        "norms 1",
        found=_first_of(on_any_rank) if on_any_rank else f"so in all {len(problems)}",
        remedy="they are not what the initialiser draws: report it with the spec",
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def deviation(weight: torch.Tensor, expected: Distribution) -> str | None:
    """How a whole parameter differs from what it was drawn from, beyond chance; None where it does not."""
    if expected.std == 0.0:
        wrong = int((weight != expected.mean).sum())
        return f"is not {expected.mean:g} in {wrong} of {weight.numel()} places" if wrong else None
    mean, std = mean_and_std(weight)
    slack = STANDARD_ERRORS / math.sqrt(weight.numel())
    mean_is_right = abs(mean - expected.mean) <= slack * expected.std
    if mean_is_right and abs(std / expected.std - 1.0) <= slack / math.sqrt(2):  # neither holds of NaN
        return None
    return f"has mean {mean:.2g} and deviation {std:.3g} where {expected.mean:g} and {expected.std:.3g} are due"


def mean_and_std(weight: torch.Tensor) -> tuple[float, float]:
    """Of all elements, summed in fp64 a piece at a time: no copy of the whole is made."""
    total = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for piece in weight.flatten().split(PIECE_ELEMENTS):
        values = piece.float()
        total += torch.stack([values.sum(dtype=torch.float64), values.square().sum(dtype=torch.float64)])
    mean, square = (total / weight.numel()).tolist()
    return mean, math.sqrt(max(square - mean**2, 0.0)) if math.isfinite(square) else math.nan


def _first_of(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else f"{problems[0]}, and {len(problems) - 1} more like it"
