"""The states of a checkpoint, parameter by parameter, whatever the ZeRO stage and number of ranks that wrote it.

Files are mapped into memory, so that a reader touches the bytes that it asks for and no more.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from pydantic import ValidationError

from dsllm.checkpoint.layout import fragments_file
from dsllm.checkpoint.manifest import ANOTHER, read_manifest
from dsllm.checkpoint.safe_load import DEEPSPEED_CLASSES
from dsllm.data.shards import Record
from dsllm.engine.fragments import Fragment, Nesting
from dsllm.errors import CheckpointError, first_line

Kind = Literal["fp32", "exp_avg", "exp_avg_sq", "momentum_buffer"]
MASTER: Kind = "fp32"
ADAM_MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS: tuple[Kind, ...] = ("momentum_buffer",)
"""What is kept of each parameter, all in fp32, by the names that DeepSpeed and torch have for it."""

UNIVERSAL_STATES = "zero"
"""Folder of a converted checkpoint that has a folder for each parameter."""
OPTIMIZER_STATE_FILE = "optimizer_state.pt"
"""What its parameters have in common, in that folder."""


class RankStates(Record):
    """`fragments_rank<r>.json`: how to read one rank's states in the file that DeepSpeed wrote."""

    file: str
    """Name of that file."""
    nesting: Nesting
    """How DeepSpeed nests tensors in it."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of every parameter, whole."""
    loss_scaler: Mapping[str, float | None]
    """Numbers of fp16's loss scaler, by attribute; empty without one."""
    fragments: tuple[Fragment, ...]


class SavedStates(Protocol):
    """What a checkpoint holds."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of every parameter, by name."""
    adam_step: int
    """Updates that the moments have seen."""
    loss_scaler: Mapping[str, float | None]

    def moments(self, name: str) -> tuple[Kind, ...]:
        """What is kept of a parameter beside its weights: Adam's, also before their first update, or Muon's."""

    def copy(self, kind: Kind, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` (a vector of fp32) with the elements of a parameter from `start` on."""


def open_states(checkpoint: Path) -> SavedStates:
    """The states of a complete checkpoint. Raises CheckpointError where they cannot be read."""
    is_universal = read_manifest(checkpoint).zero_stage is None
    return UniversalStates(checkpoint) if is_universal else RankwiseStates(checkpoint)


class RankwiseStates:
    """A checkpoint as DeepSpeed writes it: a file for each rank, or at stage 0 one for all."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        manifest = read_manifest(checkpoint)
        world_size = manifest.world_size or 1
        # At stage 0 rank 0 writes for all.
        files = [fragments_file(checkpoint, rank) for rank in range(world_size if manifest.zero_stage else 1)]
        self._ranks = [_read_rank(path) for path in files]
        if self._ranks[0].nesting == "nvme":
            raise CheckpointError(
                f"{checkpoint}: optimizer states are on NVMe in DeepSpeed's own files; resume it as it was written, "
                "with zero.offload_optimizer nvme at the same stage and number of ranks"
            )
        self.shapes = self._ranks[0].shapes
        self.loss_scaler = self._ranks[0].loss_scaler
        self._opened: dict[int, Sequence[_Group]] = {}
        self._pieces: dict[str, list[tuple[int, Fragment]]] = defaultdict(list)
        names = list(self.shapes)
        for rank, states in enumerate(self._ranks):
            for fragment in states.fragments:
                self._pieces[names[fragment.parameter]].append((rank, fragment))

    @property
    def adam_step(self) -> int:
        return max((group.step for group in self._groups(0)), default=0)

    def moments(self, name: str) -> tuple[Kind, ...]:
        rank, piece = self._pieces[name][0]
        is_muon = MUON_MOMENTS[0] in self._groups(rank)[piece.group].optimizer_state
        return MUON_MOMENTS if is_muon else ADAM_MOMENTS

    def copy(self, kind: Kind, name: str, start: int, out: torch.Tensor) -> None:
        missing = out.numel()
        for rank, piece in self._pieces[name]:
            first = max(start, piece.param_start)
            count = min(start + out.numel(), piece.param_start + piece.numel) - first
            if count <= 0:
                continue
            flat = self._groups(rank)[piece.group].of(kind)
            place = out.narrow(0, first - start, count)
            if flat is None:
                place.zero_()  # moments of a run whose optimizer has not made a step yet
            else:
                place.copy_(flat.narrow(0, piece.flat_start + first - piece.param_start, count))
            missing -= count
        if missing:
            raise CheckpointError(f"{self._checkpoint}: {missing} elements of {name} are in no file; {ANOTHER}")

    def _groups(self, rank: int) -> Sequence[_Group]:
        """The flat tensors of one rank, its file mapped at the first use."""
        if rank not in self._opened:
            states = self._ranks[rank]
            self._opened[rank] = _GROUPS[states.nesting](mapped(self._checkpoint / states.file), states)
        return self._opened[rank]


class UniversalStates:
    """A converted checkpoint (convert.py): DeepSpeed's universal layout, a folder for each parameter."""

    def __init__(self, checkpoint: Path) -> None:
        self._folder = checkpoint / UNIVERSAL_STATES
        names = sorted(path.parent.name for path in self._folder.glob(f"*/{MASTER}.pt"))
        if not names:
            raise CheckpointError(f"{self._folder}: no parameters in it; {ANOTHER}")
        self.shapes = {name: tuple(self._tensor(MASTER, name).shape) for name in names}
        common = mapped(self._folder / OPTIMIZER_STATE_FILE)["dsllm"]
        self.adam_step = int(common["adam_step"])
        self.loss_scaler = common["loss_scaler"]

    def moments(self, name: str) -> tuple[Kind, ...]:
        is_muon = (self._folder / name / f"{MUON_MOMENTS[0]}.pt").is_file()
        return MUON_MOMENTS if is_muon else ADAM_MOMENTS

    def copy(self, kind: Kind, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self._tensor(kind, name).flatten().narrow(0, start, out.numel()))

    def _tensor(self, kind: Kind, name: str) -> torch.Tensor:
        return cast(torch.Tensor, mapped(self._folder / name / f"{kind}.pt")["param"])


def mapped(path: Path) -> dict[str, Any]:
    """A file of torch's, its tensors mapped from the disk. Raises CheckpointError."""
    try:
        with torch.serialization.safe_globals(DEEPSPEED_CLASSES):
            return cast(dict[str, Any], torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}; {ANOTHER}") from error


def _read_rank(path: Path) -> RankStates:
    try:
        return RankStates.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; {ANOTHER}") from error


# --- how DeepSpeed nests them (0.19.8) --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Master and optimizer state of one flat tensor."""

    master: torch.Tensor
    optimizer_state: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.optimizer_state.get("step", 0))

    def of(self, kind: Kind) -> torch.Tensor | None:
        """As a vector; None for moments that do not exist yet."""
        tensor = self.master if kind == MASTER else self.optimizer_state.get(kind)
        return None if tensor is None else tensor.flatten()


def _flat(content: dict[str, Any], states: RankStates) -> list[_Group]:
    """Stages 1 and 2, BF16_Optimizer among them."""
    state = content["optimizer_state_dict"]
    return _pair(state["single_partition_of_fp32_groups"], state["base_optimizer_state"])


def _partitioned(content: dict[str, Any], states: RankStates) -> list[_Group]:
    """Stage 3."""
    state = content["optimizer_state_dict"]
    return _pair(state["fp32_flat_groups"], state["optimizer_state_dict"])


def _flat_stage_0(content: dict[str, Any], states: RankStates) -> list[_Group]:
    """Stage 0 in half precision: FP16_Optimizer."""
    state = content["optimizer"]
    return _pair(state["fp32_groups_flat"], state["optimizer_state_dict"])


def _whole(content: dict[str, Any], states: RankStates) -> list[_Group]:
    """Stage 0 in fp32: torch's own optimizer, a group for each parameter in its order."""
    names = list(states.shapes)
    masters = [content["module"][names[fragment.parameter]] for fragment in states.fragments]
    return _pair(masters, content["optimizer"])


def _pair(masters: Sequence[torch.Tensor], adam: Mapping[str, Any]) -> list[_Group]:
    """torch numbers parameters through, group by group."""
    numbers = [number for group in adam["param_groups"] for number in group["params"]]
    return [_Group(master, adam["state"].get(number, {})) for master, number in zip(masters, numbers, strict=True)]


_GROUPS: dict[Nesting, Callable[[dict[str, Any], RankStates], list[_Group]]] = {
    "flat": _flat,
    "partitioned": _partitioned,
    "flat_stage_0": _flat_stage_0,
    "whole": _whole,
}
