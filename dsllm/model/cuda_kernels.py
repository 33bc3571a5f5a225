"""Operations that are other kernels on a CUDA device than on the CPU, and so hold other bytes.

For fake tensors on the CPU that stand for CUDA ones. An Ampere GPU or a later one is assumed: earlier ones have no
flash attention.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as functional

from dsllm.model.replaced import replaced
from dsllm.plan.attention import FLASH_LARGEST_WIDTH, FLASH_WIDTH_MULTIPLE
from dsllm.units import round_up

ATEN = torch.ops.aten

FLASH_ROWS = 128
"""Multiple to which its backward rounds the sequence."""


@contextlib.contextmanager
def cuda_kernels() -> Iterator[None]:
    """Within, attention and dropout are those that torch would choose on a CUDA device.

    The functions themselves are replaced: a TorchFunctionMode is off during backward, where checkpointed blocks are
    computed again.
    """
    with replaced(functional, "scaled_dot_product_attention", attention), replaced(functional, "dropout", dropout):
        yield


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """One kernel that keeps a byte for each element, where the CPU keeps a mask in the elements' type."""
    if not training or p == 0:
        return input
    kept: torch.Tensor = torch.native_dropout(input, p, training)[0]
    return kept


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Flash attention where it can, else the memory-efficient kernel, else the plain products.

    Inputs are (sequences, heads, tokens, width of a head). The conditions are those of sdp::use_flash_attention and
    sdp::use_mem_efficient_attention, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp. cuDNN's kernel, which may
    come first on Hopper, keeps what flash attention keeps.
    """
    if attn_mask is None and _fits_flash(query, key, value):
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if query.shape[1] == key.shape[1] and query.shape[-1] % (16 // query.element_size()) == 0:
        bias = None if attn_mask is None else _additive(attn_mask, query)
        return ATEN._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
    return ATEN._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def flash_backward_workspace_bytes(query: torch.Tensor, key: torch.Tensor) -> int:
    """Beside the gradients of query, key and value: the query's gradient and the row sums in fp32; and, where heads
    share keys and values, the gradients of these for every head.

    mha_bwd, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
    """
    sequences, heads, tokens, width = query.shape
    rows = sequences * heads * round_up(tokens, FLASH_ROWS)
    accumulated = 4 * rows * (round_up(width, 32 if width <= 128 else 64) + 1)
    shared = 0 if key.shape[1] == heads else 2 * sequences * heads * key.shape[2] * width * key.element_size()
    return accumulated + shared


def _fits_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    width = query.shape[-1]
    return is_half and width == key.shape[-1] == value.shape[-1] and width <= FLASH_LARGEST_WIDTH


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    width = query.shape[-1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    missing = -width % FLASH_WIDTH_MULTIPLE
    if missing:
        query, key, value = (functional.pad(tensor, (0, missing)) for tensor in (query, key, value))
    out: torch.Tensor = ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
        0
    ]
    return out[..., :width] if missing else out


def _additive(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask of truth values as what is added to the scores, for every head."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.logical_not(), -math.inf)
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], mask.shape[-1])
