"""A trained model on the device and in the type that it is to speak in."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PreTrainedModel

from dsllm.errors import UserError
from dsllm.model.build import DTYPES
from dsllm.spec.sections import Precision

Device = Literal["auto", "cpu", "cuda"]


def place(model: PreTrainedModel, device: Device, precision: Precision | None) -> PreTrainedModel:
    """The same model, moved and converted in place.

    `auto` is a GPU where torch finds one. `precision` None is fp32 on the CPU, and bf16 on a GPU that has it. Raises
    UserError for `cuda` without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("--device: given cuda, and torch finds no GPU here; choose cpu, or auto")
    on_gpu = has_gpu and device != "cpu"
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    usual = torch.bfloat16 if has_bf16 else torch.float32
    dtype = usual if precision is None else DTYPES[precision]
    # Parameters alone: rotary frequencies are buffers, which 16 bits would spoil.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to("cuda" if on_gpu else "cpu")
