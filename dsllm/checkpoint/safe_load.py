"""Reading DeepSpeed's checkpoint files without running what they might hold."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

DEEPSPEED_CLASSES = [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler, LossScaleConfig]
"""All that DeepSpeed's files hold besides tensors and plain containers (seen in 0.19.8)."""

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Within, torch.load builds tensors, plain containers and DEEPSPEED_CLASSES, and refuses anything else.

    DeepSpeed asks for weights_only=False, which lets a pickle call any function; torch's own switch overrules it.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
