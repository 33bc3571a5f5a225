"""Whether the first weights are what their initialiser says, or their source, on the run's own engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PreTrainedModel

from dsllm.engine import ranks
from dsllm.engine.gates.check import Check
from dsllm.model.gather import gathered
from dsllm.model.initialize import Distribution, initial_distribution, initializer_range

if TYPE_CHECKING:
    from dsllm.engine.starting_point import StartingPoint

STANDARD_ERRORS = 6.0
"""Chance goes beyond once in 500 million tensors. From 7,200 elements on, a deviation that is wrong by a tenth lies at
least as far beyond: twice 6 / sqrt(2 x 7200) is 0.1."""
PIECE_ELEMENTS = 2**22
"""Looked at in fp32 at a time: 16 MiB."""
CARRIED_TOLERANCE = 1e-6
"""Part of the deviation by which sums in fp64 of the same numbers may differ, on the CPU and on a GPU."""


class Moments(NamedTuple):
    """What is known of the elements of a weight: enough to tell it from any other."""

    mean: float
    std: float


def check_weights(causal_lm: PreTrainedModel, start: StartingPoint | None = None) -> Check:
    """Whether every parameter of an engine's model, before its first step, is what it was drawn from; or what was read
    of the model `start`, on every rank. Collective."""
    if start is not None:
        return _check(
            causal_lm,
            lambda name, parameter: difference(moments_of(parameter), start.moments[name]),
            expected="finite, each with the mean and deviation of what was read",
            remedy="where they are not finite, start from another copy of the model; else report it with the spec",
        )
    config = causal_lm.config
    return _check(
        causal_lm,
        lambda name, parameter: deviation(parameter, initial_distribution(name, parameter.ndim, config)),
        expected=f"matrices of deviation {initializer_range(config):g}, less before the residual; biases 0, norms 1",
        remedy="they are not what the initialiser draws: report it with the spec",
    )


def _check(
    causal_lm: PreTrainedModel,
    problem_of: Callable[[str, torch.Tensor], str | None],
    expected: str,
    remedy: str,
) -> Check:
    started = time.perf_counter()
    problems = {}
    for name, parameter in causal_lm.named_parameters():
        with gathered(parameter):
            problems[name] = problem_of(name, parameter)
    wrong = [f"{name} {problem}" for name, problem in problems.items() if problem is not None]
    on_any_rank = max(ranks.gather(wrong), key=len)
    return Check(
        name="weights",
        passed=not on_any_rank,
        expected=expected,
        found=_first_of(on_any_rank) if on_any_rank else f"so in all {len(problems)}",
        remedy=remedy,
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def deviation(weight: torch.Tensor, expected: Distribution) -> str | None:
    """How a whole parameter differs from what it was drawn from, beyond chance; None where it does not."""
    if expected.std == 0.0:
        wrong = int((weight != expected.mean).sum())
        return f"is not {expected.mean:g} in {wrong} of {weight.numel()} places" if wrong else None
    mean, std = moments_of(weight)
    slack = STANDARD_ERRORS / math.sqrt(weight.numel())
    mean_is_right = abs(mean - expected.mean) <= slack * expected.std
    if mean_is_right and abs(std / expected.std - 1.0) <= slack / math.sqrt(2):  # neither holds of NaN
        return None
    return f"has mean {mean:.2g} and deviation {std:.3g} where {expected.mean:g} and {expected.std:.3g} are due"


def difference(found: Moments, expected: Moments) -> str | None:
    """How a weight is not what was read; None where it is."""
    slack = CARRIED_TOLERANCE * (abs(expected.mean) + expected.std)
    if abs(found.mean - expected.mean) <= slack and abs(found.std - expected.std) <= slack:  # neither holds of NaN
        return None
    return (
        f"has mean {found.mean:.6g} and deviation {found.std:.6g} where {expected.mean:.6g} and {expected.std:.6g} "
        "were read"
    )


@torch.no_grad()
def moments_of(weight: torch.Tensor) -> Moments:
    """Of all elements, summed in fp64 a piece at a time: no copy of the whole is made."""
    total = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for piece in weight.flatten().split(PIECE_ELEMENTS):
        values = piece.float()
        total += torch.stack([values.sum(dtype=torch.float64), values.square().sum(dtype=torch.float64)])
    mean, square = (total / weight.numel()).tolist()
    return Moments(mean, math.sqrt(max(square - mean**2, 0.0)) if math.isfinite(square) else math.nan)


def _first_of(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else f"{problems[0]}, and {len(problems) - 1} more like it"
