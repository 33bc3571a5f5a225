"""Initial weights: the same bits for the same seed at every ZeRO stage, on any number of ranks, on any device.

Each parameter is drawn in fp32 on the CPU from a generator of its own, seeded by the run's seed and the parameter's
name. Nothing depends on the order of construction or on which rank draws.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dsllm.model.gather import gathered
from dsllm.model.suitability import is_own_family, own_vectors, without_number

RESIDUAL_PROJECTIONS = (
    "c_proj.weight",  # gpt2
    "o_proj.weight",  # llama and its like
    "down_proj.weight",
    "experts.down_proj",
    "attention.dense.weight",  # gpt_neox, and some of other types
    "dense_4h_to_h.weight",
    "out_proj.weight",
    "fc2.weight",
)
"""Names that the matrices which write to the residual stream end in."""

INITIALIZER_RANGE = 0.02
"""Of a model type whose configuration does not say."""


class Distribution(NamedTuple):
    """Normal, or one value where the deviation is 0."""

    mean: float
    std: float


def initialize_weights(model: PreTrainedModel, seed: int) -> None:
    """Set every parameter of `model`, partitioned (ZeRO-3) or not, in place, as `initial_distribution` has it."""
    for name, parameter in model.named_parameters():
        with gathered(parameter, writer=0) as is_writer:
            if is_writer:
                _set(name, parameter, seed, initial_distribution(name, parameter.ndim, model.config))


def initial_distribution(name: str, num_dimensions: int, config: PretrainedConfig) -> Distribution:
    """What the elements of the parameter `name` are drawn from.

    Matrices are normal with the configuration's `initializer_range`; those that write to the residual stream have it
    divided by sqrt(2 x layers), because each block adds two of them (GPT-2 report, sec. 2.3). Biases are 0, norms 1; in
    model types that no family here has, vectors are what transformers makes them.
    """
    if num_dimensions < 2:
        return Distribution(_vector_value(name, config), 0.0)
    std = initializer_range(config)
    if name.endswith(RESIDUAL_PROJECTIONS):
        std /= math.sqrt(2 * config.num_hidden_layers)
    return Distribution(0.0, std)


def initializer_range(config: PretrainedConfig) -> float:
    """The deviation of its matrices, by either name that model types have for it (OPT and XGLM: `init_std`)."""
    deviation: float = getattr(config, "initializer_range", getattr(config, "init_std", INITIALIZER_RANGE))
    return deviation


def _vector_value(name: str, config: PretrainedConfig) -> float:
    if not is_own_family(config) and (value := own_vectors(config).get(without_number(name))) is not None:
        return value
    return 0.0 if name.endswith("bias") else 1.0


def parameter_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one parameter, stable over Python versions and processes."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _set(name: str, parameter: torch.nn.Parameter, seed: int, distribution: Distribution) -> None:
    mean, std = distribution
    with torch.no_grad():
        if std == 0.0:
            parameter.fill_(mean)
        else:
            generator = torch.Generator().manual_seed(parameter_seed(seed, name))
            parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(mean, std, generator=generator))
