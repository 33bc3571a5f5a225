"""What one rank does in an optimizer step, counted: matrix arithmetic, bytes through its memory, the host's part.

`h` is the width, `i` that of the feed-forward layer, `s` the sequence length. Coefficients of bytes are those of 16-bit
elements, which other types scale. The eager ones are the inputs and outputs of every operator that autograd runs in
transformers' modules, summed; matrix products and fused attention are left out, because their time is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsllm.plan.activations import CHUNK_LOGITS_BYTES
from dsllm.plan.model_shape import ModelShape, Style
from dsllm.plan.muon import orthogonalisation_flops
from dsllm.plan.workload import ELEMENT_BYTES, Workload

Kernels = Literal["eager", "fused"]
"""`eager`: a kernel for each operator. `fused`: torch.compile's, or written by hand: one for each chain of them."""


@dataclass(frozen=True)
class BlockCosts:
    """What a block costs besides its matrix products: bytes for each element of the widths, and the host's seconds."""

    forward_hidden_bytes: int
    forward_intermediate_bytes: int
    backward_hidden_bytes: int
    backward_intermediate_bytes: int
    host_seconds: float
    """Of Python and launches in forward and backward, for each micro-step."""


BLOCKS: dict[tuple[Style, Kernels], BlockCosts] = {
    # transformers 5.23 with torch 2.13, every dispatched operator counted; seconds measured with tensors so small that
    # nothing else takes any, on one core of a cloud CPU
    ("gpt2", "eager"): BlockCosts(20, 4, 46, 8, 1.2e-3),
    ("llama", "eager"): BlockCosts(125, 10, 287, 18, 1.6e-3),
    # each tensor that leaves a fused chain is written once, and read once by the next: two norms with their residuals,
    # the activation function, rotary positions, biases' gradients
    ("gpt2", "fused"): BlockCosts(12, 4, 26, 8, 1.6e-4),
    ("llama", "fused"): BlockCosts(20, 6, 32, 10, 2.4e-4),
}

QUERY_NORM_BYTES = (36, 96)
"""For each element of the queries and keys that pass norms of their own, in forward and backward; counted as above."""

ROUTING_BYTES = (12, 12)
"""For each element of the width, where a router chooses experts for it: its matrix's input, and the sum of what the
experts give."""

EXPERT_BYTES = (20, 60)
"""The same for each expert that a token takes: it is gathered, weighed in fp32 and put back."""

EXPERT_GATE_BYTES = 8
"""For each element of a chosen expert's width in backward, beside the feed-forward layer's: gate and up are one matrix,
whose gradients are joined."""

LOSS_BYTES = {"plain": 34, "chunked": 38, "fused": 10}
"""Bytes for each logit over forward and backward: 16-bit logits, their fp32 copy, its log-softmax, gradients of each;
fused, only the logits and their gradient in the same place."""

CHUNK_GRADIENT_BYTES = 12
"""For each weight of the projection and each chunk of the loss: a product is read and added to the fp32 sum."""

PLAIN_ATTENTION_BYTES = 40
"""For each score of the plain attention: scaled, masked, softmax in fp32, cast; forward and backward."""

OPTIMIZER_BYTES = 50
"""For each parameter that a rank steps: Adam reads and writes three fp32 numbers, reads the gradient, writes the weight
(30); before, the gradient is copied to fp32, its norm taken, and clipped (20)."""

FLAT_OPTIMIZER_BYTES = 64
"""The same at stage 0 in 16 bits, for which dsllm takes DeepSpeed's flat optimizer (runtime/fp16/fused_optimizer.py,
step): the largest and the smallest gradient are sought (4), gradients cast to fp32 (6), put in a row (8), their norm
taken (4), clipped (8); torch's fused Adam reads four fp32 numbers and writes three (28); the weight is written (6)."""

HOOK_SECONDS = {0: 0.0, 1: 5e-4, 2: 1.1e-3, 3: 8e-3}
"""By stage: what DeepSpeed 0.19.8's hooks take of the host in forward and backward of a block, measured as above: the
mean of both families."""

COPIED_BYTES = {0: 0, 1: 0, 2: 8, 3: 16}
"""By stage, for each parameter and micro-step: into the reduction's bucket and out of it, and at stage 3 out of what
was gathered, twice."""

STEP_SECONDS, STEP_BLOCK_SECONDS = 2e-3, 5e-4
"""The host's part of an optimizer step, and what each block adds to it, measured as above."""

CHUNK_SECONDS = 8e-5
"""The host's part of a chunk of the loss: 14 launches of 6 microseconds."""


@dataclass(frozen=True)
class Work:
    """A number of everything that takes time on a GPU."""

    matmul_flops: float = 0.0
    attention_flops: float = 0.0
    moved_bytes: float = 0.0
    host_seconds: float = 0.0
    """Python and launches, which go on beside the GPU's work and are hidden where that is longer."""

    def times(self, count: float) -> Work:
        return Work(
            self.matmul_flops * count, self.attention_flops * count, self.moved_bytes * count, self.host_seconds * count
        )

    def plus(self, other: Work) -> Work:
        return Work(
            self.matmul_flops + other.matmul_flops,
            self.attention_flops + other.attention_flops,
            self.moved_bytes + other.moved_bytes,
            self.host_seconds + other.host_seconds,
        )


def micro_step_work(run: Workload, micro_batch_size: int, kernels: Kernels) -> Work:
    """Forward and backward of one micro-batch on one rank."""
    forward, backward = block_work(run, kernels)
    again = run.num_checkpointed
    tokens = micro_batch_size * run.sequence_length
    blocks = forward.plus(backward).times(run.shape.num_layers).plus(forward.times(again)).times(tokens)
    launched = run.shape.num_layers + again / 3
    host = launched * BLOCKS[run.shape.style, kernels].host_seconds
    host += run.shape.num_layers * HOOK_SECONDS[run.zero.stage]
    return blocks.plus(Work(host_seconds=host)).plus(head_work(run, tokens)).plus(gradient_work(run))


def block_work(run: Workload, kernels: Kernels) -> tuple[Work, Work]:
    """Forward and backward of a block on the GPU, for each token."""
    shape, costs, element = run.shape, BLOCKS[run.shape.style, kernels], run.element_bytes
    weights = matmul_parameters(shape)
    outputs, inputs = _matmul_widths(shape)
    forward_attention, backward_attention, row_bytes = _attention(run)
    taken = shape.num_experts_per_token or 1
    special_forward, special_backward = _special_bytes(shape)
    forward_bytes = costs.forward_hidden_bytes * shape.hidden_size + special_forward
    forward_bytes += costs.forward_intermediate_bytes * taken * shape.intermediate_size
    backward_bytes = costs.backward_hidden_bytes * shape.hidden_size + special_backward
    backward_bytes += costs.backward_intermediate_bytes * taken * shape.intermediate_size
    scale = element / 2
    return (
        Work(2 * weights, forward_attention, scale * (forward_bytes + row_bytes / 2) + element * outputs),
        Work(4 * weights, backward_attention, scale * (backward_bytes + row_bytes / 2) + element * inputs),
    )


def matmul_parameters(shape: ModelShape) -> int:
    """Parameters of a block that multiply a token: all but norms, biases and the experts that it does not take."""
    attention = 2 * shape.hidden_size * (shape.query_size + shape.key_value_size)
    return attention + (shape.num_experts_per_token or 1) * shape.expert_parameters + shape.router_parameters


def _special_bytes(shape: ModelShape) -> tuple[int, int]:
    """What norms of queries and the choice of experts move of a token beside what every block does."""
    normed = shape.query_size + shape.key_value_size if shape.norms_queries else 0
    forward, backward = (bytes_moved * normed for bytes_moved in QUERY_NORM_BYTES)
    if not shape.num_experts:
        return forward, backward
    width, taken = shape.hidden_size, shape.num_experts_per_token
    forward += (ROUTING_BYTES[0] + EXPERT_BYTES[0] * taken) * width
    backward += (
        ROUTING_BYTES[1] + EXPERT_BYTES[1] * taken
    ) * width + EXPERT_GATE_BYTES * taken * shape.intermediate_size
    return forward, backward


def _matmul_widths(shape: ModelShape) -> tuple[int, int]:
    """Elements that a block's matrix products write for a token, in forward and (gradients of inputs) in backward.

    A tile is written after its arithmetic, so that this is not hidden behind it: products over a narrow width are less
    efficient, the more so the faster a GPU computes for its memory.
    """
    h, i, q, kv = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_value_size
    if shape.style == "gpt2":
        return 5 * h + i, 3 * h + i
    attention = h + q + 2 * kv
    if not shape.num_experts:
        return attention + h + 2 * i, 5 * h + q + i
    taken = shape.num_experts_per_token
    return attention + shape.num_experts + taken * (h + 2 * i), 4 * h + q + taken * (h + i)


def _attention(run: Workload) -> tuple[float, float, float]:
    """FLOP of attention's products in forward and backward, and bytes of its rows, for a token and block.

    Fused attention skips the masked half and computes the scores again in backward: 2 and 5 products of s x h, halved
    (FlashAttention-2, arXiv:2307.08691). The plain one computes whole rows and stores them: 2 and 4.
    """
    product = 2.0 * run.sequence_length * run.shape.query_size
    if run.attention == "sdpa":
        return product, 2.5 * product, 0.0
    return 2 * product, 4 * product, PLAIN_ATTENTION_BYTES * run.shape.num_attention_heads * run.sequence_length


def head_work(run: Workload, tokens: int) -> Work:
    """The output projection and the loss; its matrix is counted once, whether or not it is the embedding."""
    shape = run.shape
    num_logits = tokens * shape.padded_vocab_size
    moved = LOSS_BYTES[run.loss] * num_logits
    chunks = 1
    if run.loss == "chunked":
        chunks = -(-4 * num_logits // CHUNK_LOGITS_BYTES)
        moved += chunks * CHUNK_GRADIENT_BYTES * shape.embedding_parameters
    return Work(6 * num_logits * shape.hidden_size, 0, moved, CHUNK_SECONDS * chunks)


def gradient_work(run: Workload) -> Work:
    """Weights' gradients are written in every micro-step, copied for ZeRO, and added to the sum so far."""
    written = 2 * run.element_bytes + 2 * ELEMENT_BYTES[run.accumulation_precision]
    copied = COPIED_BYTES[run.zero.stage] * run.element_bytes / 2
    return Work(moved_bytes=(written + copied) * run.shape.allocated_parameters)


def optimizer_work(run: Workload, world_size: int) -> Work:
    """The update of what a rank is responsible for; where the host does that, only the host's part of it remains."""
    host = STEP_SECONDS + STEP_BLOCK_SECONDS * run.shape.num_layers
    sharers = world_size if run.zero.stage else 1
    orthogonalised = orthogonalisation_flops(run) / sharers
    if run.zero.offload_optimizer != "none":
        return Work(matmul_flops=orthogonalised, host_seconds=host)
    if run.zero.stage == 0 and run.precision != "fp32":
        moved: float = FLAT_OPTIMIZER_BYTES * run.shape.allocated_parameters
    else:
        moved = OPTIMIZER_BYTES * run.shape.allocated_parameters / sharers
    return Work(matmul_flops=orthogonalised, moved_bytes=moved, host_seconds=host)
