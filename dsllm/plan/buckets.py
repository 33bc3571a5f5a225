"""How many elements ZeRO communicates, gathers and steps at a time: fitted to the model unless the spec says."""

from __future__ import annotations

from dsllm.plan.model_shape import ModelShape
from dsllm.plan.workload import ZeroSettings
from dsllm.units import round_up

BUCKET_ELEMENTS = 50_000_000
"""100 MB of bf16: fills a network link, and is small beside the states of any model that is worth sharding.
DeepSpeed's own 5e8 is 1 GB, four times the weights of a 124M model."""

SUB_GROUP_ELEMENTS = 100_000_000
"""Tile of the stage 3 optimizer step."""

PERSISTENT_VECTORS = 10
"""Parameters of up to so many times the width (norms, biases) stay whole at stage 3: gathering them costs more in
latency than it saves in memory."""


def reduce_bucket_elements(zero: ZeroSettings, shape: ModelShape) -> int:
    """Gradient elements that are reduced at a time."""
    return zero.reduce_bucket_elements or min(BUCKET_ELEMENTS, shape.allocated_parameters)


def gather_bucket_elements(zero: ZeroSettings, shape: ModelShape) -> int:
    """Parameter elements gathered at a time: after a step at stages 1 and 2, ahead of use at stage 3."""
    if zero.gather_bucket_elements:
        return zero.gather_bucket_elements
    if zero.stage == 3:
        return min(BUCKET_ELEMENTS, shape.parameters_per_layer)
    return round_up(reduce_bucket_elements(zero, shape), 2)  # DeepSpeed asserts that it is even


def sub_group_elements(shape: ModelShape) -> int:
    """Stage 3: elements that the optimizer steps at a time."""
    return min(SUB_GROUP_ELEMENTS, shape.allocated_parameters)


def persistence_threshold_elements(zero: ZeroSettings, shape: ModelShape) -> int:
    """Stage 3: parameters up to this size stay whole on every rank."""
    given = zero.persistence_threshold_elements
    return PERSISTENT_VECTORS * shape.hidden_size if given is None else given


def live_elements(zero: ZeroSettings, shape: ModelShape) -> int:
    """Stage 3: parameters gathered at any time at most. Two blocks live while a third is fetched, and the embedding."""
    blocks = min(3, shape.num_layers) * shape.parameters_per_layer
    return zero.max_live_elements or shape.embedding_parameters + blocks
