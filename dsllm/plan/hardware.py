"""The GPUs that dsllm knows: what they hold and how fast they are at best."""

from __future__ import annotations

from dataclasses import dataclass

from dsllm.errors import UserError
from dsllm.units import GIB


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, under the name that options take."""

    name: str
    memory_bytes: int
    """What CUDA offers to programs, a little less than what is printed on the box."""
    peak_flops: float
    """16-bit matrix arithmetic without sparsity, fp32 accumulation, FLOP a second (the maker's data sheets)."""
    device_names: tuple[str, ...]
    """What tells it in the name that CUDA reports, in which every one of these must stand."""
    has_bf16: bool = True


GPUS = (
    Gpu("t4-16gb", int(14.56 * GIB), 65e12, ("T4",), has_bf16=False),
    Gpu("l4-24gb", int(21.95 * GIB), 121e12, ("L4",)),
    Gpu("a10g-24gb", int(21.98 * GIB), 70e12, ("A10G",)),
    Gpu("rtx-4090-24gb", int(23.52 * GIB), 165.2e12, ("RTX 4090",)),
    Gpu("v100-32gb", int(31.73 * GIB), 125e12, ("V100", "32GB"), has_bf16=False),
    Gpu("a100-40gb", int(39.38 * GIB), 312e12, ("A100", "40GB")),
    Gpu("h100-80gb", int(79.10 * GIB), 989.4e12, ("H100", "HBM3")),
    Gpu("a100-80gb", int(79.14 * GIB), 312e12, ("A100", "80GB")),
    Gpu("h200-141gb", int(139.70 * GIB), 989.4e12, ("H200",)),
    Gpu("b200-180gb", int(178.30 * GIB), 2250e12, ("B200",)),
)
"""By memory. H100, H200 and B200 are the SXM ones."""


def gpu_named(name: str) -> Gpu:
    """The GPU of that name; the memory may be left out where one kind is meant. Raises UserError for an unknown one."""
    wanted = name.lower()
    exact = [gpu for gpu in GPUS if gpu.name == wanted]
    matching = exact or [gpu for gpu in GPUS if gpu.name.startswith(f"{wanted}-")]
    if len(matching) != 1:
        names = [gpu.name for gpu in matching or GPUS]
        raise UserError(f"GPU: given '{name}'; must be one of {', '.join(names)}")
    return matching[0]


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU behind a name such as `NVIDIA A100-SXM4-40GB`; None for one that is not in the catalogue."""
    # `L40S` contains `L4`: a part of a name counts only up to where letters and digits end.
    words = device_name.replace("-", " ").upper().split()
    for gpu in GPUS:
        if all(all(word in words for word in part.split()) for part in gpu.device_names):
            return gpu
    return None
