"""A workload for a number of parameters alone, where nothing else is known about the model."""

from __future__ import annotations

import math
from dataclasses import replace

from dsllm.plan.cost import compute_optimal_tokens
from dsllm.plan.model_shape import ModelShape
from dsllm.plan.workload import Workload
from dsllm.units import round_up

HEAD_SIZE = 64
VOCAB_SIZE = 50257
SEQUENCE_LENGTH = 1024
WIDTH_PER_LAYER = 64
"""GPT-2 small has 768 / 12. The loss depends little on the ratio over a wide range (arXiv:2001.08361, sec. 3.1)."""
RATIO_COST = 0.02
"""What an e-fold departure from that ratio counts against an error in the number of parameters."""

BATCH_SEQUENCES = ((800_000_000, 512), (3_000_000_000, 1024), (10_000_000_000, 2048), (math.inf, 4096))
"""Sequences in a batch, by the largest number of parameters: 0.5M to 3.2M tokens (arXiv:2005.14165, table 2.1), as
powers of two."""


def typical_workload(parameters: int) -> Workload:
    """A GPT-2 of about that many parameters, as most would train it: 1,024 positions, bf16, the whole activations."""
    width, layers = typical_shape(parameters)
    shape = ModelShape(
        family="gpt2",
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=width // HEAD_SIZE,
        num_key_value_heads=width // HEAD_SIZE,
        head_size=HEAD_SIZE,
        intermediate_size=4 * width,
        max_position_embeddings=SEQUENCE_LENGTH,
        vocab_size=VOCAB_SIZE,
        padded_vocab_size=round_up(VOCAB_SIZE, 128),
        tie_word_embeddings=True,
    )
    return Workload(shape, SEQUENCE_LENGTH, global_batch_size=1, micro_batch_size=None, train_steps=1)


def typical_run(parameters: int) -> Workload:
    """The same as a whole run: compute-optimal in tokens, in batches as GPT-3's of that size had."""
    run = typical_workload(parameters)
    sequences = next(size for limit, size in BATCH_SEQUENCES if parameters <= limit)
    steps = -(-compute_optimal_tokens(run) // (sequences * run.sequence_length))
    return replace(run, global_batch_size=sequences, train_steps=steps)


def typical_shape(parameters: int) -> tuple[int, int]:
    """Width and depth that come near the number at a usual ratio of the two."""
    widths = range(HEAD_SIZE, 2**15 + 1, HEAD_SIZE)
    shapes = [(width, max(1, round((parameters - VOCAB_SIZE * width) / (12 * width**2)))) for width in widths]
    return min(shapes, key=lambda shape: _cost(shape[0], shape[1], parameters))


def _cost(width: int, layers: int, parameters: int) -> float:
    count = 12 * layers * width**2 + VOCAB_SIZE * width
    ratio = width / (WIDTH_PER_LAYER * layers)
    return abs(count - parameters) / parameters + RATIO_COST * abs(math.log(ratio))
