"""Bytes that forward leaves behind for backward on one rank.

Counted from what transformers' modules save, in units of a token: `h` the width, `i` that of the feed-forward layer,
`w` the bytes of an element. The coefficients agree to the byte with the tensors that autograd saves in a forward of
either family with scaled-dot-product attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsllm.plan.attention import (
    STATISTIC_BYTES,
    attention_bytes_per_token,
    attention_peak_bytes_per_token,
    shared_bytes_per_token,
)
from dsllm.plan.model_shape import ModelShape
from dsllm.plan.workload import CHECKPOINTED_BLOCKS, Device, Workload
from dsllm.units import MIB

CHUNK_LOGITS_BYTES = 64 * MIB
"""fp32 logits that the chunked loss holds at a time: enough to keep matrix kernels busy, little beside activations."""

PRODUCT_BYTES = 32 * MIB
"""Rows of the output projection's gradient, in 16 bits, that the chunked loss adds to the fp32 sum at a time."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank, weights and their gradients left out.

    By arithmetic here; by tracing the real model in model/trace.py.
    """

    saved_bytes: int
    """Held for backward at the end of forward, the loss left out."""
    loss_forward_bytes: int
    """Beside `saved_bytes` while the loss is computed, at most."""
    loss_backward_bytes: int
    """Beside `saved_bytes` while the loss's backward runs, at most, the gradient of the head's weights among it."""
    block_backward_bytes: int
    """Beside `saved_bytes` in the backward of the last block, at most: what is computed again, and gradients of
    activations."""
    first_block_bytes: int
    """Left of everything above in the backward of the first block, at most, when the others are done."""


def activations(run: Workload, micro_batch_size: int, device: Device = "cuda") -> Activations:
    """Of `micro_batch_size` sequences.

    A checkpointed block keeps only its input; while backward computes one again, its activations live beside those of
    the others.
    """
    tokens = micro_batch_size * run.sequence_length
    block, boundary = block_bytes_per_token(run, device), run.element_bytes * run.shape.hidden_size
    every = CHECKPOINTED_BLOCKS.get(run.activation_checkpointing)
    routed = run.element_bytes * run.shape.num_experts  # logits, which the balancing loss takes of every block
    kept = (run.shape.num_layers - run.num_checkpointed) * block + run.num_checkpointed * (boundary + routed)
    final_norm = _norm_bytes_per_token(run) - boundary  # its output is the loss's input, and counted there
    at_once = max(block + _gradients_per_token(run, device), attention_peak_bytes_per_token(run, device))
    # what is kept of a block that is computed again is the input of its first norm, unless that makes an fp32 copy
    makes_copy = run.shape.style == "llama" and run.element_bytes < 4
    input_beside = boundary if every and makes_copy else 0
    kept_of_last = block
    if every is not None and (run.shape.num_layers - 1) % every == 0:
        kept_of_last = 0 if makes_copy else boundary
    shared = shared_bytes_per_token(run, device)
    loss_forward, loss_backward = _loss_bytes(run, tokens, device)
    slack = run.shape.activation_slack
    embedding_mask = _dropout_masks(run, device) // 2
    return Activations(
        saved_bytes=round(slack * tokens * (kept + final_norm + shared + embedding_mask)),
        loss_forward_bytes=loss_forward,
        loss_backward_bytes=loss_backward,
        # the final norm is done by then
        block_backward_bytes=round(slack * tokens * (at_once - kept_of_last - final_norm)),
        first_block_bytes=round(slack * tokens * (at_once + input_beside + shared)),
    )


def block_bytes_per_token(run: Workload, device: Device = "cuda") -> int:
    """What one block saves of a token."""
    element = run.element_bytes
    block = _gpt2_block(run.shape, element) if run.shape.style == "gpt2" else _llama_block(run)
    return block + attention_bytes_per_token(run, device) + _dropout_masks(run, device)


def _gpt2_block(shape: ModelShape, element: int) -> int:
    """Two norms with input and output, query, key and value, attention's output: 8h. The feed-forward's
    GELU with input and output: 2i."""
    statistics = 2 * 2 * element
    return element * (8 * shape.hidden_size + 2 * shape.intermediate_size) + statistics


def _llama_block(run: Workload) -> int:
    """Two RMS norms; query, key, value and attention's output; gate, its SiLU, up and their product: 4i."""
    shape, element = run.shape, run.element_bytes
    attention = element * (2 * shape.query_size + 2 * shape.key_value_size) + _query_norms(run)
    feed_forward = _experts(run) if shape.num_experts else element * 4 * shape.intermediate_size
    return 2 * _norm_bytes_per_token(run) + attention + feed_forward


def _query_norms(run: Workload) -> int:
    """The norms of queries and keys, a head at a time: as other RMS norms, but that nothing keeps their output."""
    shape = run.shape
    if not shape.norms_queries:
        return 0
    heads = shape.num_attention_heads + shape.num_key_value_heads
    return (4 + run.element_bytes) * heads * shape.head_size + STATISTIC_BYTES * heads


def _experts(run: Workload) -> int:
    """For each expert that a token takes: its input, 4i as ever, and its output, which the router weighs. The router's
    logits and their softmax in fp32; and where each choice goes and comes from, five indices of 8 bytes."""
    shape, element = run.shape, run.element_bytes
    chosen = shape.num_experts_per_token * (element * (4 * shape.intermediate_size + 2 * shape.hidden_size) + 5 * 8)
    return chosen + (4 + element) * shape.num_experts + STATISTIC_BYTES


def _norm_bytes_per_token(run: Workload) -> int:
    """A layer norm saves its input, and its output is saved by what comes next; an RMS norm its input in fp32 (which in
    fp32 is the input itself), the normalised rows and the output."""
    shape, element = run.shape, run.element_bytes
    if shape.style == "gpt2":
        return 2 * element * shape.hidden_size
    return (4 + 2 * element) * shape.hidden_size + STATISTIC_BYTES


def _dropout_masks(run: Workload, device: Device) -> int:
    """For each element of the two residual branches a byte, on the CPU an element."""
    if not run.dropout:
        return 0
    return 2 * run.shape.hidden_size * (run.element_bytes if device == "cpu" else 1)


def _gradients_per_token(run: Workload, device: Device) -> int:
    """Gradients of activations at the widest point of a block's backward, less what is consumed by then.

    GPT-2: the residual stream's, and GELU's in the place of its output. Llama: the residual stream's, the product's,
    and both its factors' in the place of the product. CUDA's dropout makes one of its own, when its mask has gone.
    """
    if run.shape.num_experts:
        return _expert_gradients_per_token(run)
    widest = run.shape.intermediate_size * (1 if run.shape.style == "gpt2" else 2)
    dropped = (run.element_bytes - 1) * run.shape.hidden_size if run.dropout and device == "cuda" else 0
    return run.element_bytes * (run.shape.hidden_size + widest) + dropped


def _expert_gradients_per_token(run: Workload) -> int:
    """The same with experts: where their outputs are weighed, which is in fp32, three of them and what they are cast
    to; or where gate and up are widest, as ever but for each chosen expert, whose output is consumed by then."""
    element, chosen, width = run.element_bytes, run.shape.num_experts_per_token, run.shape.hidden_size
    cast = element * width - 8 if element < 4 else 0
    weighed = chosen * (3 * 4 * width + cast)
    widest = chosen * (2 * element * run.shape.intermediate_size - element * width - 8)
    return element * width + max(weighed, widest) - 8


def _loss_bytes(run: Workload, tokens: int, device: Device) -> tuple[int, int]:
    """At most while the loss is computed, and while its backward runs: see model/loss.py."""
    hidden = tokens * run.shape.hidden_size * run.element_bytes
    if run.loss == "plain":
        return _plain_loss(tokens * run.shape.padded_vocab_size, hidden)
    if run.loss == "fused":
        return _fused_loss(run, tokens, hidden)
    return _chunked_loss(run, tokens, hidden, device)


def _plain_loss(num_logits: int, hidden: int) -> tuple[int, int]:
    """fp32 logits and their log-softmax; in backward the latter, its gradient and that of the logits."""
    return hidden + 8 * num_logits, hidden + 12 * num_logits


def _chunked_loss(run: Workload, tokens: int, hidden: int, device: Device) -> tuple[int, int]:
    """The hidden states and their gradient; the projection's gradient, which adds up in fp32 and waits for backward in
    the type of the weights (fp16: in fp32); the logits of one piece. Backward scales into new tensors."""
    element, projection = run.element_bytes, run.shape.embedding_parameters
    logits = min(tokens, max(1, CHUNK_LOGITS_BYTES // (4 * run.shape.padded_vocab_size))) * run.shape.padded_vocab_size
    product = 0 if element == 4 else min(PRODUCT_BYTES, element * projection)
    cast = product * 4 // element if device == "cpu" else 0  # CUDA adds 16 bits to fp32 without a copy
    piece = 4 * logits if element == 4 else (4 + element) * logits + product + cast
    waiting = element if run.precision == "bf16" else 4
    at_end = waiting * projection if waiting < 4 else 0
    # backward scales what waits into new tensors, and fp16 casts the projection's from fp32
    scaled = (waiting + (element if waiting > element else 0)) * projection
    backward = max(2 * hidden + waiting * projection + scaled, _norm_backward(run, tokens))
    return 2 * hidden + 4 * projection + max(piece, at_end), backward


def _fused_loss(run: Workload, tokens: int, hidden: int) -> tuple[int, int]:
    """liger-kernel 0.6, fused_linear_cross_entropy: as many pieces as the vocabulary is wider than the model; gradients
    in the place of the logits, and the projection's in fp32 with a product beside it."""
    element, projection = run.element_bytes, run.shape.embedding_parameters
    pieces = max(1, run.shape.padded_vocab_size // run.shape.hidden_size)
    logits = -(-tokens // pieces) * run.shape.padded_vocab_size
    forward = 2 * hidden + (4 + element + 4) * projection + 2 * element * logits
    return forward, max(hidden + 2 * element * projection, _norm_backward(run, tokens))


def _norm_backward(run: Workload, tokens: int) -> int:
    """The final RMS norm's backward, with the head's gradient waiting: fp32 copies of gradients; a layer norm needs
    fewer than the loss."""
    if run.shape.style == "gpt2":
        return 0
    per_element = 18 if run.element_bytes == 2 else 16
    return per_element * run.shape.hidden_size * tokens + run.element_bytes * run.shape.embedding_parameters
