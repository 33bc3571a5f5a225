"""A spec for a number of parameters alone, where nothing else is known about the model."""

from __future__ import annotations

import math

from dsllm.spec.sections import (
    Batch,
    Data,
    Model,
    PretrainedTokenizer,
    PythonStdlibSource,
    Spec,
    Training,
    Zero,
)

HEAD_SIZE = 64
VOCAB_SIZE = 50257
WIDTH_PER_LAYER = 64
"""GPT-2 small has 768 / 12. The loss depends little on the ratio over a wide range (arXiv:2001.08361, sec. 3.1)."""
RATIO_COST = 0.02
"""What an e-fold departure from that ratio counts against an error in the number of parameters."""


def typical_spec(parameters: int) -> Spec:
    """A GPT-2 of about that many parameters, as most would train it: 1,024 positions, bf16, the whole activations."""
    width, layers = typical_shape(parameters)
    return Spec(
        name="typical",
        model=Model(family="gpt2", num_layers=layers, hidden_size=width, num_attention_heads=width // HEAD_SIZE),
        tokenizer=PretrainedTokenizer(kind="pretrained", name="gpt2"),
        data=Data(sources=(PythonStdlibSource(kind="python-stdlib"),)),
        batch=Batch(sequence_length=1024, global_batch_size=1, micro_batch_size="auto"),
        training=Training(train_steps=1),
        zero=Zero(stage=0),
    )


def typical_shape(parameters: int) -> tuple[int, int]:
    """Width and depth that come near the number at a usual ratio of the two."""
    widths = range(HEAD_SIZE, 2**15 + 1, HEAD_SIZE)
    shapes = [(width, max(1, round((parameters - VOCAB_SIZE * width) / (12 * width**2)))) for width in widths]
    return min(shapes, key=lambda shape: _cost(shape[0], shape[1], parameters))


def _cost(width: int, layers: int, parameters: int) -> float:
    count = 12 * layers * width**2 + VOCAB_SIZE * width
    ratio = width / (WIDTH_PER_LAYER * layers)
    return abs(count - parameters) / parameters + RATIO_COST * abs(math.log(ratio))
