"""The states of any checkpoint into a live engine, whatever stage and number of ranks wrote it and which this one has.

DeepSpeed's own loading wants the same number of ranks and the same stage, and from its universal checkpoints stage 3
gives every parameter group the weight decay of the first one (0.19.8, load_hp_checkpoint_state_from_checkpoint_dir_
stage3). Here each rank reads the bytes of its own fragments and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from dsllm.checkpoint.states import ADAM_MOMENTS, MASTER, MUON_MOMENTS, Kind, open_states
from dsllm.engine import ranks
from dsllm.engine.fragments import Fragment, Layout, layout_of, shapes_of
from dsllm.engine.muon import MuonAdamW
from dsllm.errors import CheckpointError

SCALER_NUMBERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in a loss scaler of fp16 over a run; each stage's has most of them."""


def restore_states(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Weights, moments and loss scale of `checkpoint` into `engine`, in place; collective.

    Raises CheckpointError, on every rank, where its parameters are not those of the engine or a file cannot be read.
    """
    with ranks.together():
        _fill_own_part(engine, checkpoint)
    _renew_weights(engine)


@torch.no_grad()
def _fill_own_part(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Of this rank: fp32 weights, moments and loss scale. Not collective."""
    states, layout, shapes = open_states(checkpoint), layout_of(engine), shapes_of(engine)
    _check_same_parameters(checkpoint, states.shapes, shapes)
    names = list(shapes)

    def fill(kind: Kind, fragment: Fragment, flat: torch.Tensor) -> None:
        place = flat.view(-1).narrow(0, fragment.flat_start, fragment.numel)
        states.copy(kind, names[fragment.parameter], fragment.param_start, place)

    for fragment in layout.fragments:
        master = layout.masters[fragment.group]
        fill(MASTER, fragment, master)
        if states.adam_step:
            state = _optimizer_state(layout, master, states.adam_step)
            for moment in _moments(layout, master):
                fill(moment, fragment, state[moment])
        else:  # written before the first update: moments begin with the next one
            layout.optimizer.state.pop(master, None)
    _set_numbers(loss_scaler_of(engine), states.loss_scaler)


def loss_scaler_of(engine: DeepSpeedEngine) -> Any:
    """The object that holds fp16's loss scale, at every stage; None where losses are not scaled."""
    if not engine.fp16_enabled():
        return None
    wrapper = engine.optimizer
    return wrapper.loss_scale_config if isinstance(wrapper, FP16_Optimizer) else wrapper.loss_scaler


def loss_scaler_numbers(engine: DeepSpeedEngine) -> dict[str, float | None]:
    """Its numbers, by attribute; empty without one."""
    scaler = loss_scaler_of(engine)
    return {name: getattr(scaler, name) for name in SCALER_NUMBERS if hasattr(scaler, name)}


def _set_numbers(scaler: Any, numbers: Mapping[str, float | None]) -> None:
    for name, value in numbers.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _moments(layout: Layout, master: torch.Tensor) -> tuple[Kind, ...]:
    """What the optimizer keeps of a flat tensor."""
    is_muon = isinstance(layout.optimizer, MuonAdamW) and master in layout.optimizer.divisions
    return MUON_MOMENTS if is_muon else ADAM_MOMENTS


def _optimizer_state(layout: Layout, master: torch.Tensor, step: int) -> dict[str, Any]:
    """The state of one flat tensor, made where the optimizer has made no step yet, with Adam's count of updates."""
    state, moments = layout.optimizer.state[master], _moments(layout, master)
    for moment in moments:
        if moment not in state:
            state[moment] = torch.zeros_like(master, dtype=torch.float32, requires_grad=False)
    if moments != ADAM_MOMENTS:
        return state
    if isinstance(layout.optimizer, DeepSpeedCPUAdam):
        state["step"] = step
    else:  # torch's AdamW counts on the device where it is fused, else on the host
        device = master.device if layout.optimizer.defaults.get("fused") else "cpu"
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    return state


@torch.no_grad()
def _renew_weights(engine: DeepSpeedEngine) -> None:
    """Cast the fp32 weights to those that the forward uses, on every rank that needs them; collective."""
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        wrapper.checkpoint_event_prologue()
        for group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        wrapper.checkpoint_event_epilogue()
    elif isinstance(wrapper, DeepSpeedZeroOptimizer | BF16_Optimizer):
        wrapper.update_lp_params()
    elif isinstance(wrapper, FP16_Optimizer):
        for weights, master in zip(wrapper.fp16_groups_flat, wrapper.fp32_groups_flat, strict=True):
            weights.copy_(master)


def _check_same_parameters(
    checkpoint: Path, saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{checkpoint}: its parameters are not those of the spec: {name} is {saved.get(name)} there and "
            f"{wanted.get(name)} here, {len(differing)} differ in all; resume with the spec that it was written with"
        )
