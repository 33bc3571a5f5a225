"""The random number generators that dropout draws from."""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator

States = dict[str, torch.Tensor]


def generator_states() -> States:
    """Where this rank's generators are now: one for the CPU, one for its accelerator."""
    states = {"cpu": torch.get_rng_state()}
    if _has_accelerator():
        states["accelerator"] = get_accelerator().get_rng_state()
    return states


def set_generator_states(states: States) -> None:
    """Put this rank's generators back to where they were; that of an accelerator where it is one now as well."""
    torch.set_rng_state(states["cpu"])
    if "accelerator" in states and _has_accelerator():
        get_accelerator().set_rng_state(states["accelerator"])


def reseed(step: int) -> None:
    """Seed this rank's generators anew for a run that goes on after `step` without their states, so that dropout does
    not draw again what it drew at the beginning."""
    torch.manual_seed(torch.initial_seed() + step * 2**33)  # beyond every sum of a seed and a rank


def _has_accelerator() -> bool:
    return bool(get_accelerator().device_name() != "cpu")
