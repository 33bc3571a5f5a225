"""This machine's own devices, without torch: its cores, GPUs and their free memory, asked of the driver's program, and
where it is kept what was calibrated here."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dsllm.units import MIB

SMI = "nvidia-smi"
FIELDS = "index,uuid,name,memory.total,memory.used,memory.free"
QUERY = (f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits")
SECONDS_TO_ANSWER = 20.0
"""A driver that hangs must not hang a prediction or a start; one without persistence mode wakes its GPUs for each
question, which takes eight of them more than 5 s."""


@dataclass(frozen=True)
class LocalGpu:
    """One GPU as it is now."""

    name: str
    """As the driver has it, `NVIDIA A100-SXM4-40GB`."""
    memory_bytes: int
    used_bytes: int
    """By processes; what the driver keeps for itself is neither used nor free."""
    free_bytes: int


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def calibration_file() -> Path:
    """`dsllm/calibration.json` in the user's folder of settings (XDG Base Directory Specification)."""
    # the specification has relative paths ignored
    given = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".config") / "dsllm" / "calibration.json"


def local_gpus() -> list[LocalGpu]:
    """Those that a run may use, in the order of CUDA_VISIBLE_DEVICES; none where no driver answers."""
    if shutil.which(SMI) is None:
        return []
    from dsllm.launch.topology import selected_devices  # not needed where there is no driver, and not free

    selected = selected_devices()
    if selected == ():
        return []
    found = [gpu for line in ask_driver(*QUERY) if (gpu := _gpu(line)) is not None]
    if selected is None:
        return [gpu for _, gpu in found]
    return [gpu for one in selected for names, gpu in found if _is_named(one, names)]


def ask_driver(*options: str) -> list[str]:
    """Lines that nvidia-smi answers; none where it is missing, fails, or takes longer than SECONDS_TO_ANSWER."""
    try:
        done = subprocess.run([SMI, *options], capture_output=True, text=True, check=True, timeout=SECONDS_TO_ANSWER)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _gpu(line: str) -> tuple[tuple[str, str], LocalGpu] | None:
    """Index and UUID, and the GPU, of a line of the answer; None for one that has no memory of its own to tell."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 6 or not all(field.isdecimal() for field in fields[3:]):
        return None
    index, uuid, name = fields[:3]
    total, used, free = (int(mib) * MIB for mib in fields[3:])
    return (index, uuid), LocalGpu(name, total, used, free)


def _is_named(selected: str, names: tuple[str, str]) -> bool:
    """CUDA takes an index, or a UUID that may be cut short."""
    index, uuid = names
    return selected == index or (not selected.isdecimal() and uuid.startswith(selected))
