"""Bytes that forward leaves behind for backward on one rank.

Counted from what transformers' modules save, in units of a token: `h` the width, `i` that of the feed-forward layer,
`w` the bytes of an element. The coefficients agree to the byte with the tensors that autograd saves in a forward of
either family with scaled-dot-product attention.
"""

from __future__ import annotations

from dsllm.plan.model_shape import ModelShape
from dsllm.plan.precision import ELEMENT_BYTES
from dsllm.spec.sections import Spec
from dsllm.units import MIB

CHUNK_LOGITS_BYTES = 64 * MIB
"""fp32 logits that the chunked loss holds at a time: enough to keep matrix kernels busy, little beside activations."""

STATISTIC_BYTES = 4
"""Of a norm's statistics or of a row's log-sum-exp."""


def layer_bytes_per_token(spec: Spec, shape: ModelShape) -> int:
    """What one block saves of a token."""
    element = ELEMENT_BYTES[spec.training.precision]
    block = _gpt2_block(shape, element) if shape.family == "gpt2" else _llama_block(shape, element)
    return block + _attention_rows(spec, shape, element) + _dropout_masks(spec, shape)


def _gpt2_block(shape: ModelShape, element: int) -> int:
    """Two norms with input and output, query, key and value, attention's output: 8h. The feed-forward's
    GELU with input and output: 2i."""
    statistics = 2 * 2 * element
    return element * (8 * shape.hidden_size + 2 * shape.intermediate_size) + statistics


def _llama_block(shape: ModelShape, element: int) -> int:
    """Two RMS norms, each with its input in fp32, the normalised rows and the output; query, key, value and attention's
    output; gate, its SiLU, up and their product: 4i."""
    norms = 2 * ((4 + 2 * element) * shape.hidden_size + STATISTIC_BYTES)
    attention = element * (2 * shape.hidden_size + 2 * shape.key_value_size)
    return norms + attention + element * 4 * shape.intermediate_size


def _attention_rows(spec: Spec, shape: ModelShape, element: int) -> int:
    """Fused attention saves a log-sum-exp for each head; the plain one whole rows: fp32 softmax, its cast, the sum."""
    if spec.model.attention == "sdpa":
        return STATISTIC_BYTES * shape.num_attention_heads
    return shape.num_attention_heads * spec.batch.sequence_length * (4 + 2 * element)


def _dropout_masks(spec: Spec, shape: ModelShape) -> int:
    """A byte for each element of the two residual branches."""
    return 2 * shape.hidden_size if spec.model.dropout else 0


def activations_bytes(spec: Spec, shape: ModelShape, micro_batch_size: int) -> int:
    """Everything that is saved at the end of forward, the loss left out.

    A checkpointed block saves only its input; while backward computes one again, its activations live beside them.
    """
    tokens = micro_batch_size * spec.batch.sequence_length
    boundary = ELEMENT_BYTES[spec.training.precision] * shape.hidden_size
    whole = layer_bytes_per_token(spec, shape)
    checkpointed = {"none": 0, "selective": -(-shape.num_layers // 2), "full": shape.num_layers}
    again = checkpointed[spec.training.activation_checkpointing]
    blocks = (shape.num_layers - again) * whole + again * boundary + (whole if again else 0)
    final_norm = (2 if shape.family == "gpt2" else 4) * boundary
    return tokens * (blocks + final_norm)


def block_gradients_bytes(spec: Spec, shape: ModelShape, micro_batch_size: int) -> int:
    """Gradients in flight in a block's backward: of the residual stream, and of its widest layer going in and out."""
    element = ELEMENT_BYTES[spec.training.precision]
    tokens = micro_batch_size * spec.batch.sequence_length
    return tokens * element * (2 * shape.hidden_size + 2 * shape.intermediate_size)


def logits_bytes(spec: Spec, shape: ModelShape, micro_batch_size: int) -> tuple[int, int]:
    """What the loss holds at the end of forward, and at the start of backward."""
    element = ELEMENT_BYTES[spec.training.precision]
    tokens = micro_batch_size * spec.batch.sequence_length
    if spec.training.loss == "plain":
        return _plain_logits(tokens * shape.padded_vocab_size, element)
    # The projection's gradient adds up in fp32 and is held in the type of the weights (fp16: in fp32) until backward.
    held = 2 if spec.training.precision == "bf16" else 4
    hidden_gradient = tokens * shape.hidden_size * element
    chunk = min(CHUNK_LOGITS_BYTES, 4 * tokens * shape.padded_vocab_size)
    forward = hidden_gradient + (4 + element) * shape.embedding_parameters + chunk * (4 + element) // 4
    backward = 2 * hidden_gradient + (held + max(held, element)) * shape.embedding_parameters
    return forward, backward


def _plain_logits(num_logits: int, element: int) -> tuple[int, int]:
    """Logits, their fp32 copy and its log-softmax; in backward the gradients of the latter two besides."""
    fp32_copy = 4 if element == 2 else 0
    forward = element + fp32_copy + 4
    return forward * num_logits, (forward + 4) * num_logits
