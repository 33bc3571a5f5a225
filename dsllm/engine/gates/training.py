"""Whether a spec's settings train: its own engine, loop and ranks, on a shrunk model and tokens that mean nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from dsllm.engine.activity import Activity
from dsllm.engine.first_loss import untrained_loss
from dsllm.engine.gates.check import Check, timed
from dsllm.engine.gates.small_run import (
    Steps,
    at_stage,
    next_token_loss,
    own_tokens,
    release_engines,
    shrink,
    small_engine,
    train,
)
from dsllm.engine.memory_meter import MemoryMeter
from dsllm.engine.ranks import World
from dsllm.engine.requests import Requests
from dsllm.model.shapes import shape_of
from dsllm.spec.sections import Precision, Spec

COMPARED_STEPS = 3
"""The first shows gradients, the second the update, the third what was kept from one to the other."""
OVERFIT_STEPS = 30
OVERFIT_LOSS = 1.0
"""Nats a token. It begins near 6; in every family, stage and precision it was below 0.3 after 30 steps."""
ACCUMULATION = 4
ACCUMULATION_REMEDY = "choose a batch.micro_batch_size that needs none, and see docs/checks.md"
FIRST_LOSS_TOLERANCE = 0.5
"""Nats; the batch of the first step is small. Labels that are the inputs themselves are off by 0.9 or more."""
LOSS_TOLERANCES: dict[Precision, float] = {"fp32": 3e-4, "bf16": 2e-3, "fp16": 2e-3}
NORM_TOLERANCES: dict[Precision, float] = {"fp32": 3e-3, "bf16": 1.5e-2, "fp16": 1.5e-2}
"""Relative, for each step done: differences of rounding grow with the updates. Without one rank's gradients the norm
is off by one part in as many as there are ranks, or more."""


def check_small_model(spec: Spec, world: World, requests: Requests, activity: Activity) -> list[Check]:
    """The checks of training, in their order; the run that follows is none the different for them. Collective."""
    checks = list(timed(_checks(spec, world, requests, activity)))
    release_engines()
    return checks


def _checks(spec: Spec, world: World, requests: Requests, activity: Activity) -> Iterator[Check]:
    small, tokens = shrink(spec), own_tokens(world.rank)
    precision, stage = spec.training.precision, spec.zero.stage
    take = functools.partial(train, tokens=tokens, requests=requests, memory=MemoryMeter(None), activity=activity)
    with small_engine(small, world.size) as engine:
        steps = take(engine, num_steps=COMPARED_STEPS)
        yield first_loss(steps.losses[0], small)
        take(engine, num_steps=OVERFIT_STEPS - COMPARED_STEPS)
        yield one_batch(next_token_loss(engine, small, tokens))
    with small_engine(small, world.size, ACCUMULATION) as engine:
        accumulated = take(engine, num_steps=COMPARED_STEPS)
        yield agreement("accumulation", accumulated, steps, precision, "without it", ACCUMULATION_REMEDY)
    reference = 2 if stage == 1 else 1  # never 0, where DeepSpeed's fp16 is wrong: see docs/LOG.md
    with small_engine(at_stage(small, reference), world.size) as engine:
        plain = take(engine, num_steps=COMPARED_STEPS)
        name, remedy = f"stage {stage} against {reference}", f"choose zero.stage {reference}, and see docs/checks.md"
        yield agreement(name, steps, plain, precision, f"at stage {reference}", remedy)


def first_loss(loss: float, small: Spec) -> Check:
    """Whether a model that has learned nothing loses as much as it must."""
    expected = untrained_loss(shape_of(small), small)
    return Check(
        name="first loss",
        passed=abs(loss - expected) <= FIRST_LOSS_TOLERANCE,
        expected=f"{expected:.2f} within {FIRST_LOSS_TOLERANCE:g}, about ln of the small vocabulary",
        found=f"{loss:.2f}",
        remedy="the weights are not what model.initializer_range says, or the labels are not the tokens that follow",
    )


def one_batch(loss: float) -> Check:
    """Whether a batch was learned by heart: the loss of the trained weights in a plain model."""
    return Check(
        name="one batch",
        passed=loss <= OVERFIT_LOSS,
        expected=f"a loss below {OVERFIT_LOSS:g} after {OVERFIT_STEPS} steps on one batch",
        found=f"{loss:.3f}",
        remedy="gradients, optimizer or labels are wrong: see docs/checks.md",
    )


def agreement(name: str, found: Steps, expected: Steps, precision: Precision, where: str, remedy: str) -> Check:
    """Whether two ways to take the same steps agree, within what rounding explains; `where` names the expected one."""
    loss_tolerance, norm_tolerance = LOSS_TOLERANCES[precision], NORM_TOLERANCES[precision]
    apart = _first_apart("loss", found.losses, expected.losses, loss_tolerance)
    apart = apart or _first_apart("gradient norm", found.gradient_norms, expected.gradient_norms, norm_tolerance)
    return Check(
        name=name,
        passed=apart is None,
        expected=f"losses and gradient norms as {where}, within {loss_tolerance:.2%} and {norm_tolerance:.1%} a step",
        found=apart or f"{len(found.losses)} steps alike",
        remedy=remedy,
    )


def _first_apart(what: str, found: list[float], expected: list[float], tolerance: float) -> str | None:
    for step, (one, other) in enumerate(zip(found, expected, strict=True), start=1):
        if not abs(one - other) <= step * tolerance * abs(other):  # so put, NaN is apart
            return f"{what} {one:.4f} where {other:.4f} is due, in step {step}"
    return None
