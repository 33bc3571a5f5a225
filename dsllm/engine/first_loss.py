"""What a model that has learned nothing loses: the first step of a run must lose about as much."""

from __future__ import annotations

import logging
import math

from dsllm.errors import TrainingError
from dsllm.plan.model_shape import ModelShape
from dsllm.spec.derived import initializer_range
from dsllm.spec.sections import Spec

logger = logging.getLogger(__name__)

FIRST_LOSS_TOLERANCE = 3.0
"""Nats that the first loss may lie from its expectation. A missing initialisation is off by tens."""


def check_first_loss(loss: float, untrained_loss: float, *, is_untrained: bool = True) -> None:
    """Raises TrainingError where the first loss is absurd for a model that knows nothing, whose is `untrained_loss`; or
    for one that has learned something: far above that."""
    logger.info("first loss %.3f; a model that has learned nothing has %.3f", loss, untrained_loss)
    if not is_untrained:
        if loss - untrained_loss > FIRST_LOSS_TOLERANCE:
            raise TrainingError(
                f"step 1: the loss is {loss:.2f}, where even an untrained model has {untrained_loss:.2f}; the model of "
                "model.init.name has not learned these tokens: compare its tokenizer with the run's"
            )
        return
    if abs(loss - untrained_loss) > FIRST_LOSS_TOLERANCE:
        raise TrainingError(
            f"step 1: the loss is {loss:.2f}, where an untrained model has {untrained_loss:.2f} (about ln of the "
            "vocabulary); the weights are not what model.initializer_range says, or the labels are not the inputs' own"
        )


def untrained_loss(shape: ModelShape, spec: Spec) -> float:
    """Loss in nats of a model that has learned nothing: ln(vocabulary), and half the variance of its logits.

    Logits of a normalised state of width h with weights of deviation s have variance h x s^2; the mean of
    log(sum(exp)) of normal logits exceeds ln(vocabulary) by half of it.
    """
    return math.log(shape.padded_vocab_size) + 0.5 * shape.hidden_size * initializer_range(spec.model) ** 2
