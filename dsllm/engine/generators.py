"""The random number generators that dropout draws from."""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator

States = dict[str, torch.Tensor]


def generator_states() -> States:
    """Where this rank's generators are now: one for the CPU, one for its accelerator."""
    states = {"cpu": torch.get_rng_state()}
    if get_accelerator().device_name() != "cpu":
        states["accelerator"] = get_accelerator().get_rng_state()
    return states


def set_generator_states(states: States) -> None:
    """Put this rank's generators back to where they were."""
    torch.set_rng_state(states["cpu"])
    if "accelerator" in states:
        get_accelerator().set_rng_state(states["accelerator"])
