"""Which storages are alive at every moment of a run, as torch's allocator would have it."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dsllm.model.cuda_kernels import flash_backward_workspace_bytes
from dsllm.units import round_up

ATEN = torch.ops.aten

CUDA_BLOCK_BYTES = 512
"""Multiple of which torch's CUDA allocator hands out memory (kMinBlockSize)."""

SOLE_OWNER = 2
"""References to the storage of a tensor that nothing else shares, as counted from an operation's arguments: the
tensor's own, and that of the Python object that is asked."""

POINTWISE = {getattr(ATEN, name).Tensor for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")}


class Ledger(TorchDispatchMode):
    """Writes down the birth and the death of every storage while it is active; see `peak_bytes` for what to ask.

    Works on real tensors and on fake ones. Views share their base's storage and cost nothing.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._is_cuda = device == "cuda"
        self._numbers = WeakIdKeyDictionary()
        self._events: list[tuple[int, int]] = []
        self._summands: dict[int, tuple[int, ...]] = {}
        self._last_number = 0

    def moment(self) -> int:
        """Now: to give to `peak_bytes` later."""
        return len(self._events)

    def add(self, tensors: Iterable[torch.Tensor]) -> set[int]:
        """Count tensors that were made elsewhere as born now; returns the numbers of their storages."""
        return {self._number(tensor) for tensor in tensors}

    def with_summands(self, storages: Iterable[int]) -> set[int]:
        """These storages, and those that autograd added up to make them."""
        found, pending = set(), list(storages)
        while pending:
            number = pending.pop()
            found.add(number)
            pending += self._summands.get(number, ())
        return found

    def held_bytes(self, moment: int, without: Collection[int] = ()) -> int:
        """Bytes alive at that moment, some storages left out."""
        return sum(size for number, size in self._events[:moment] if number not in without)

    def peak_bytes(self, start: int, end: int, without: Collection[int] = ()) -> int:
        """The most bytes that are alive at once between two moments, some storages left out."""
        held = peak = self.held_bytes(start, without)
        for number, size in self._events[start:end]:
            if number not in without:
                held += size
                peak = max(peak, held)
        return peak

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is ATEN.add.Tensor and _is_summed_in_place(args):
            return ATEN.add_.Tensor(*args)
        out = function(*args, **(kwargs or {}))
        made = self.add(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        if function is ATEN.add.Tensor and _is_autograd_summing(args):
            self._summands[made.pop()] = tuple(self._number(summand) for summand in args)
        self._note_workspace(_workspace_bytes(function, args, self._is_cuda))
        return out

    def _number(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage not in self._numbers:
            self._last_number += 1
            self._numbers[storage] = self._last_number
            size = round_up(storage.nbytes(), CUDA_BLOCK_BYTES) if self._is_cuda else storage.nbytes()
            self._events.append((self._last_number, size))
            weakref.finalize(storage, self._events.append, (self._last_number, -size)).atexit = False
        number: int = self._numbers[storage]
        return number

    def _note_workspace(self, size: int) -> None:
        """What a kernel holds while it runs, beside its results."""
        if size:
            self._last_number += 1
            self._events += [(self._last_number, size), (self._last_number, -size)]


def _is_autograd_summing(args: tuple[Any, ...]) -> bool:
    """Whether these are gradients of one tensor from two users of it, which backward adds up."""
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    first, second = args
    return isinstance(second, torch.Tensor) and (first.shape, first.dtype) == (second.shape, second.dtype)


def _is_summed_in_place(args: tuple[Any, ...]) -> bool:
    """Whether backward, left alone, would add the second gradient into the first.

    It does where nobody else holds the first, but not while a dispatch mode looks on (torch/csrc/autograd/
    input_buffer.cpp): the ledger must not find more than a run without it holds.
    """
    if not _is_autograd_summing(args):
        return False
    storage = args[0].untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) <= SOLE_OWNER


def _workspace_bytes(function: Any, args: tuple[Any, ...], is_cuda: bool) -> int:
    if is_cuda:
        is_flash = function is ATEN._scaled_dot_product_flash_attention_backward.default
        return flash_backward_workspace_bytes(*args[1:3]) if is_flash else 0
    return _promoted_bytes(args) if function in POINTWISE else 0


def _promoted_bytes(args: tuple[Any, ...]) -> int:
    """Operands of another type than the common one: the CPU casts them before it computes, CUDA in its kernel.

    TensorIteratorBase::compute_types, aten/src/ATen/TensorIterator.cpp.
    """
    operands = [operand for operand in args[:2] if isinstance(operand, torch.Tensor)]
    if len(operands) < 2 or operands[0].dtype == operands[1].dtype:
        return 0
    common = torch.result_type(*operands)
    return sum(operand.numel() * common.itemsize for operand in operands if operand.dtype != common)
