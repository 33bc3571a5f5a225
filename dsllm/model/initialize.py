"""Initial weights: the same bits for the same seed at every ZeRO stage, on any number of ranks, on any device.

Each parameter is drawn in fp32 on the CPU from a generator of its own, seeded by the run's seed and the parameter's
name. Nothing depends on the order of construction or on which rank draws.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

RESIDUAL_PROJECTIONS = ("c_proj.weight", "o_proj.weight", "down_proj.weight")
"""Names that the matrices which write to the residual stream end in, for gpt2 and llama."""


def initialize_weights(model: PreTrainedModel, seed: int) -> None:
    """Set every parameter of `model`, partitioned (ZeRO-3) or not, in place.

    Matrices are normal with the configuration's `initializer_range`; those that write to the residual stream have it
    divided by sqrt(2 x layers), because each block adds two of them (GPT-2 report, sec. 2.3). Biases are 0, norms 1.
    """
    std = model.config.initializer_range
    residual_std = std / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        with _whole(parameter) as is_writer:
            if is_writer:
                _set(name, parameter, seed, residual_std if name.endswith(RESIDUAL_PROJECTIONS) else std)


def parameter_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one parameter, stable over Python versions and processes."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _set(name: str, parameter: torch.nn.Parameter, seed: int, std: float) -> None:
    with torch.no_grad():
        if parameter.ndim >= 2:
            generator = torch.Generator().manual_seed(parameter_seed(seed, name))
            parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@contextlib.contextmanager
def _whole(parameter: torch.nn.Parameter) -> Iterator[bool]:
    """The parameter gathered from its partitions; yields whether this rank is the one that writes it."""
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield torch.distributed.get_rank() == 0
