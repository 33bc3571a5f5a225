"""Where the optimizer of an engine keeps what: the one thing that ZeRO stages and numbers of ranks do differently.

A rank's fp32 weights and Adam's moments lie in flat tensors, one for each group, at every stage; each is made of
fragments, which are stretches of parameters. A checkpoint notes its fragments down beside DeepSpeed's files, so that
those can be read parameter by parameter (states.py), and a resume fills the fragments of another engine (restore.py).
DeepSpeed's attributes are those of 0.19.8.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as distributed
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

Nesting = Literal["flat", "partitioned", "nvme", "flat_stage_0", "whole"]
"""How DeepSpeed nests the tensors in its files: stages 1 and 2; 3, and 3 with states in files of their own; 0 in half
precision; 0 in fp32."""


class Fragment(NamedTuple):
    """`numel` elements of a parameter from `param_start` on, which lie in flat tensor `group` from `flat_start` on."""

    parameter: int
    """Its place among the names of `shapes_of`."""
    param_start: int
    numel: int
    group: int
    flat_start: int


Places = Mapping[torch.nn.Parameter, int]
Groups = Iterable[Iterable[torch.nn.Parameter]]


@dataclass(frozen=True)
class Layout:
    """What this rank keeps."""

    nesting: Nesting
    optimizer: torch.optim.Optimizer
    """Adam itself, below DeepSpeed's wrappers; its `state` is keyed by the masters."""
    masters: list[torch.Tensor]
    """The flat fp32 weights of each group."""
    fragments: tuple[Fragment, ...]


def layout_of(engine: DeepSpeedEngine) -> Layout:
    """The layout of a live engine on this rank."""
    wrapper = engine.optimizer
    places = {parameter: place for place, parameter in enumerate(engine.param_names)}
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        masters = wrapper.fp32_partitioned_groups_flat
        nesting: Nesting = "nvme" if wrapper.swap_optimizer else "partitioned"
        return Layout(nesting, wrapper.optimizer, masters, tuple(_partitioned(wrapper, places)))
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        masters = wrapper.single_partition_of_fp32_groups
        return Layout("flat", wrapper.optimizer, masters, tuple(_linked(wrapper.bit16_groups, places)))
    if isinstance(wrapper, BF16_Optimizer):
        masters = wrapper.fp32_groups_flat_partition
        return Layout("flat", wrapper.optimizer, masters, tuple(_linked(wrapper.bf16_groups, places)))
    if isinstance(wrapper, FP16_Optimizer):
        masters = wrapper.fp32_groups_flat
        return Layout("flat_stage_0", wrapper.optimizer, masters, tuple(_in_a_row(wrapper.fp16_groups, places)))
    # Stage 0 in fp32: the parameters are their own masters.
    parameters = [parameter for group in wrapper.param_groups for parameter in group["params"]]
    return Layout("whole", wrapper, parameters, tuple(_in_a_row([[parameter] for parameter in parameters], places)))


def shapes_of(engine: DeepSpeedEngine) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, whole, by name, in the engine's order."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter, name in engine.param_names.items()
    }


def _partitioned(wrapper: DeepSpeedZeroOptimizer_Stage3, places: Places) -> Iterator[Fragment]:
    """Stage 3: of each parameter the rank-th of equal parts, the last of which may be short of elements."""
    rank = distributed.get_rank(wrapper.dp_process_group)
    for parameter in itertools.chain.from_iterable(wrapper.fp16_groups):
        group, flat_start, part = wrapper.grad_position[wrapper.get_param_id(parameter)]
        param_start = min(rank * part, parameter.ds_numel)
        numel = min(part, parameter.ds_numel - param_start)
        if numel:
            yield Fragment(places[parameter], param_start, numel, group, flat_start)


def _linked(groups: Groups, places: Places) -> Iterator[Fragment]:
    """Stages 1 and 2: what DeepSpeed links of each parameter to this rank's part of its flat group."""
    for group, parameters in enumerate(groups):
        for parameter in parameters:
            link = parameter._hp_mapping
            if link is not None:
                part, place = link.lp_fragment_address, link.hp_fragment_address
                yield Fragment(places[parameter], part.start, part.numel, group, place.start)


def _in_a_row(groups: Groups, places: Places) -> Iterator[Fragment]:
    """Stage 0: every rank has every parameter whole, one behind the other."""
    for group, parameters in enumerate(groups):
        flat_start = 0
        for parameter in parameters:
            yield Fragment(places[parameter], 0, parameter.numel(), group, flat_start)
            flat_start += parameter.numel()
