"""Which kernel computes attention, and what it keeps: torch chooses by device, type and the heads' width."""

from __future__ import annotations

from typing import Literal

from dsllm.plan.workload import Device, Workload
from dsllm.units import round_up

Kernel = Literal["flash", "efficient", "math", "eager"]

STATISTIC_BYTES = 4
"""Of a row's log-sum-exp, or of a norm's statistics."""

FLASH_WIDTH_MULTIPLE = 8
"""Of the width of a head, to which CUDA's flash attention pads."""

FLASH_LARGEST_WIDTH = 256

MASK_ROW_MULTIPLE = 8
"""Elements to which CUDA's memory-efficient kernel wants the rows of a mask aligned; else it would copy the mask in
every block (preprocess_mask, aten/src/ATen/native/transformers/attention.cpp)."""


def attention_kernel(run: Workload, device: Device) -> Kernel:
    """What `scaled_dot_product_attention` comes to, for GPUs from Ampere on.

    CUDA: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; the CPU's fused kernel has no dropout.
    """
    if run.attention == "eager":
        return "eager"
    if device == "cpu":
        return "math" if run.dropout else "flash"
    width, has_mask = run.shape.head_size, run.masks_documents or masks_window(run)
    if run.element_bytes == 2 and width <= FLASH_LARGEST_WIDTH and not has_mask:
        return "flash"
    # beside a mask, transformers repeats keys and values for every query head itself (use_gqa_in_sdpa)
    has_groups = run.shape.num_key_value_heads < run.shape.num_attention_heads and not has_mask
    return "math" if has_groups or width % (16 // run.element_bytes) else "efficient"


def masks_window(run: Workload) -> bool:
    """Whether a sliding window takes a mask of transformers' own; one of documents has the window in it."""
    window = run.shape.sliding_window
    return window is not None and window <= run.sequence_length and not run.masks_documents


def attention_bytes_per_token(run: Workload, device: Device) -> int:
    """What attention keeps of a token beside query, key, value and output; the mask is counted elsewhere."""
    kernel, shape, element = attention_kernel(run, device), run.shape, run.element_bytes
    if kernel == "flash" and device == "cuda":
        return STATISTIC_BYTES * shape.num_attention_heads + _padding_bytes_per_token(run)
    if kernel in ("flash", "efficient"):
        has_mask = run.masks_documents or masks_window(run)
        repeated = 2 * (shape.query_size - shape.key_value_size) * element if has_mask else 0
        # transformers' mask of a window is one of truth values, of which torch makes one to add in every block
        added = element * run.sequence_length if masks_window(run) else 0
        return STATISTIC_BYTES * shape.num_attention_heads + repeated + added
    rows = shape.num_attention_heads * run.sequence_length
    if kernel == "eager":
        # the softmax; dropout's mask and product
        return rows * (element + ((element if device == "cpu" else 1) + element if run.dropout else 0))
    # in fp32, with key and value repeated for every query head; the softmax, and dropout's mask and product
    inputs = 4 * 3 * shape.query_size - element * (shape.query_size + 2 * shape.key_value_size)
    return rows * 4 * (3 if run.dropout else 1) + inputs


def attention_peak_bytes_per_token(run: Workload, device: Device) -> int:
    """All that a block holds of a token in the backward of an attention that keeps whole rows, 0 for the others: the
    rows with their gradient and the scores', the first norm, query, key and value, and gradients of as much."""
    kernel, element = attention_kernel(run, device), run.element_bytes
    rows = run.shape.num_attention_heads * run.sequence_length
    if kernel == "eager":
        return 3 * rows * element + 2 * (run.shape.hidden_size + 2 * run.shape.query_size) * element
    if kernel == "math":
        return (4 if run.dropout else 3) * rows * 4 + (3 * element + 4 * 5) * run.shape.query_size
    return 0


def shared_bytes_per_token(run: Workload, device: Device) -> int:
    """What all blocks share of a token and keep for backward: its row of the mask (model/document_mask.py; without
    documents to mask, plain attention has transformers' causal one), and where its document places it for rotary
    positions, which are otherwise the same in all sequences.

    Fused kernels keep the mask, and so does a block that is computed again.
    """
    kernel = attention_kernel(run, device)
    has_mask = run.masks_documents or kernel == "eager"
    is_kept = kernel in ("flash", "efficient") or run.num_checkpointed > 0
    mask = round_up(run.sequence_length, MASK_ROW_MULTIPLE) if has_mask and is_kept else 0
    rotary = 2 * run.shape.head_size if run.masks_documents and run.shape.style == "llama" else 0
    return run.element_bytes * (mask + rotary)


def _padding_bytes_per_token(run: Workload) -> int:
    """Heads whose width is no multiple of 8 are padded: query, key, value and the output, and beside the latter a copy
    without padding."""
    width = run.shape.head_size
    padded = round_up(width, FLASH_WIDTH_MULTIPLE)
    if padded == width:
        return 0
    queries, keys = run.shape.num_attention_heads, run.shape.num_key_value_heads
    return run.element_bytes * ((queries + 2 * keys) * (padded - width) + queries * padded)
