"""liger-kernel's fused kernels in a model of transformers: norms, rotary positions, gated feed-forward layers.

Its own functions put them in. What they change outside of the model is taken back: they replace classes and functions
in the modules of transformers, where the next model of the process, on a CPU perhaps, would meet them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from dsllm.errors import first_line

ROTARY = "apply_rotary_pos_emb"
"""The function in a family's module of transformers that turns queries and keys."""


@dataclass(frozen=True)
class OnCuda:
    """In the place of such a function: the fused one for tensors on a CUDA device, else the plain one."""

    fused: Callable[..., Any]
    plain: Callable[..., Any]

    def __call__(self, query: torch.Tensor, *others: Any, **options: Any) -> Any:
        return (self.fused if query.is_cuda else self.plain)(query, *others, **options)


def liger_is_installed() -> bool:
    """Whether liger-kernel is, whose kernels need a CUDA device."""
    return find_spec("liger_kernel") is not None


@functools.cache
def liger_fault() -> str | None:
    """Why the installed liger-kernel cannot be imported, in a line: no triton, or a transformers too old for it; None
    where it can be."""
    try:
        import liger_kernel.transformers.monkey_patch  # noqa: F401
    except ImportError as error:
        return first_line(error)
    return None


def has_liger_kernels(model_type: str) -> bool:
    """Whether the installed liger-kernel has any for a family, by transformers' name for it."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def use_liger_kernels(causal_lm: PreTrainedModel) -> None:
    """Put all that the family has into the model, but for the loss, which `training.loss` decides. Parameters keep
    their names and values."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    put_in = MODEL_TYPE_TO_APPLY_LIGER_FN[causal_lm.config.model_type]
    wanted = {
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
        # its kernel is of SiLU alone, and it does not look
        "swiglu": getattr(causal_lm.config, "hidden_act", "silu") in ("silu", "swish"),
    }
    family = sys.modules[type(causal_lm).__module__]
    before = dict(vars(family))
    known = inspect.signature(put_in).parameters
    put_in(model=causal_lm, **{name: value for name, value in wanted.items() if name in known})
    given, rotary = before.get(ROTARY), vars(family).get(ROTARY)
    vars(family).update(before)
    if given is not None and rotary is not given:
        setattr(family, ROTARY, OnCuda(rotary, given.plain if isinstance(given, OnCuda) else given))
