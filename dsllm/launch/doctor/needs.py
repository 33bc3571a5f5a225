"""What a spec is predicted to take on the hosts that were found."""

from __future__ import annotations

from dataclasses import dataclass

from dsllm.launch.devices import calibration_file
from dsllm.plan.calibration import read_constants
from dsllm.plan.cost import checkpoint_bytes
from dsllm.plan.memory import estimate_memory
from dsllm.plan.model_shape import ModelShape
from dsllm.plan.search import choose_micro_batch
from dsllm.plan.workload import Device, workload
from dsllm.spec.sections import Spec


@dataclass(frozen=True)
class Needs:
    """A run's needs on so many ranks."""

    peak_bytes: int
    """Of each GPU; of each rank on the CPU."""
    host_bytes: int
    """Of the host for each of its ranks, by offloading."""
    checkpoint_bytes: int
    keep_last: int
    advice: str
    """Where to look for a change that takes less."""


def predict(
    spec: Spec,
    world_size: int,
    device: Device,
    device_name: str,
    device_bytes: int,
    shape: ModelShape | None = None,
) -> Needs:
    """The needs of the spec on devices of that name, the smallest with `device_bytes` of memory in all; `shape` is that
    of a network whose sizes no formula has.

    As the engine predicts them at the start. Raises UserError where the batch does not divide over the ranks.
    """
    run = workload(spec, shape=shape)
    constants = read_constants(calibration_file()).get(device_name)
    runtime_bytes = constants.runtime_bytes if constants else None
    reserved_ratio = (constants.reserved_ratio if constants else None) or 1.0
    micro = choose_micro_batch(run, world_size, device_bytes, device, runtime_bytes, reserved_ratio)
    memory = estimate_memory(
        run, world_size, micro, device=device, runtime_bytes=runtime_bytes, reserved_ratio=reserved_ratio
    )
    return Needs(
        peak_bytes=memory.peak.total_bytes,
        host_bytes=memory.host_bytes // world_size,
        checkpoint_bytes=checkpoint_bytes(run),
        keep_last=spec.checkpoint.keep_last,
        advice=f"see dsllm estimate-memory --gpus {world_size} for the smallest change that fits",
    )
