"""The devices that dsllm knows: what they hold, how fast they are, what they cost. The data is hardware.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from dsllm.errors import UserError
from dsllm.units import GIB

CATALOGUE = Path(__file__).with_name("hardware.yaml")
RUNTIME_BYTES = GIB
"""The CUDA context, kernels' workspaces and NCCL's buffers, where a device's own are not known: not among what torch
counts, but on the card."""
CPU = "cpu"
TYPES = ("bf16", "fp16", "tf32", "fp32")


@dataclass(frozen=True)
class Gpu:
    """One kind of device, under the name that options take. The fields are explained at the top of hardware.yaml."""

    name: str
    memory_bytes: int
    flops: Mapping[str, float]
    memory_bytes_per_second: float
    device_names: tuple[str, ...] = ()
    runtime_bytes: int = RUNTIME_BYTES
    matmul_share: float = 0.80
    link: Literal["nvlink", "pcie"] = "pcie"
    link_bytes_per_second: float = 3.2e10
    network_bytes_per_second: float = 1.56e9
    pcie_bytes_per_second: float = 3.2e10
    gpus_per_node: int = 8
    host_memory_bytes: int = 512 * GIB
    host_memory_bytes_per_second: float = 2e11
    nvme_bytes_per_second: float = 5e9
    price_per_hour: float | None = None
    """Dollars for each GPU; None where nobody publishes one."""
    reserved_ratio: float = 1.0
    """What torch's allocator takes over what tensors take of it, 1 or more; measured by `dsllm calibrate`, and no
    figure of the file."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where a figure is from, by its name in the file."""

    @property
    def peak_flops(self) -> float:
        """16-bit matrix arithmetic without sparsity, fp32 accumulation, FLOP a second."""
        return self.flops["bf16"] if "bf16" in self.flops else self.flops["fp16"]

    def matmul_flops(self, precision: str, tf32: bool) -> float:
        """Peak of matrix products in a precision, FLOP a second; TF32's for fp32 where that is allowed and there.

        Raises KeyError for a precision that the hardware does not have.
        """
        exact = self.flops[precision]
        return self.flops.get("tf32", exact) if precision == "fp32" and tf32 else exact

    def beside(self, tensor_bytes: int) -> int:
        """Bytes on the device that are not tensors, when tensors take that many."""
        return bytes_beside(tensor_bytes, self.runtime_bytes, self.reserved_ratio)

    @property
    def has_bf16(self) -> bool:
        return "bf16" in self.flops

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU


def bytes_beside(tensor_bytes: int, runtime_bytes: int, reserved_ratio: float) -> int:
    """What a device holds beside tensors of so many bytes: the runtime, and the gaps of torch's allocator."""
    return runtime_bytes + round((reserved_ratio - 1) * tensor_bytes)


@cache
def catalogue() -> tuple[Gpu, ...]:
    """Every device of hardware.yaml, by memory, the CPU last."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where PyYAML was built with libyaml
    document = yaml.load(CATALOGUE.read_text(encoding="utf-8"), loader)
    return _ordered(_device(name, given, CATALOGUE.name) for name, given in document.items())


def gpus() -> tuple[Gpu, ...]:
    """The GPUs of hardware.yaml, by memory."""
    return tuple(gpu for gpu in catalogue() if not gpu.is_cpu)


def with_user_file(path: Path) -> tuple[Gpu, ...]:
    """The catalogue with a user's own file laid over it. Raises UserError for a file that is not of its form."""
    from dsllm.spec.yaml_text import read_document

    document = read_document(path, str(path))
    if not isinstance(document, Mapping):
        raise UserError(f"{path}: not a catalogue of hardware; a name and its figures, as in dsllm/plan/hardware.yaml")
    known = {gpu.name: gpu for gpu in catalogue()}
    for key, given in document.items():
        name = str(key).lower()  # as gpu_named reads what is wanted
        known[name] = _device(name, given, str(path), known.get(name))
    return _ordered(known.values())


def gpu_named(name: str, known: Sequence[Gpu] | None = None) -> Gpu:
    """The device of that name; the memory may be left out where one kind is meant. Raises UserError for another."""
    wanted = name.lower()
    among = catalogue() if known is None else known
    exact = [gpu for gpu in among if gpu.name == wanted]
    matching = exact or [gpu for gpu in among if gpu.name.startswith(f"{wanted}-")]
    if len(matching) > 1:
        raise UserError(f"GPU: given '{name}'; must be one of {', '.join(gpu.name for gpu in matching)}")
    if not matching:
        raise UserError(f"GPU: given '{name}', which is not known; {_near(wanted, [gpu.name for gpu in among])}")
    return matching[0]


def gpu_of_device(device_name: str, known: Sequence[Gpu] | None = None) -> Gpu | None:
    """The GPU behind a name such as `NVIDIA A100-SXM4-40GB`, or `cpu`; None for one that is not in the catalogue."""
    # `L40S` contains `L4`: a part of a name counts only up to where letters and digits end.
    words = device_name.replace("-", " ").upper().split()
    for gpu in catalogue() if known is None else known:
        parts = gpu.device_names or (gpu.name.replace("-", " ").upper(),)
        if all(all(word in words for word in part.upper().split()) for part in parts):
            return gpu
    return None


def _near(wanted: str, names: list[str]) -> str:
    from difflib import get_close_matches

    # the memory is part of most names, and says little about what was meant
    by_kind = {name.rsplit("-", 1)[0]: name for name in reversed(names)}
    near = get_close_matches(wanted, names, n=3, cutoff=0.6)
    near += [by_kind[kind] for kind in get_close_matches(wanted, list(by_kind), n=3, cutoff=0.6)]
    if near:
        return f"did you mean {' or '.join(list(dict.fromkeys(near))[:3])}?"
    return f"must be one of {', '.join(names)}, or stand in a --hardware file"


def _ordered(devices: Any) -> tuple[Gpu, ...]:
    return tuple(sorted(devices, key=lambda gpu: (gpu.is_cpu, gpu.memory_bytes)))


_GIB_FIELDS = {"memory_gib": "memory_bytes", "runtime_gib": "runtime_bytes", "host_memory_gib": "host_memory_bytes"}
_NUMBERS = {item.name for item in fields(Gpu)} - {
    "name",
    "flops",
    "device_names",
    "link",
    "sources",
    "reserved_ratio",
    *_GIB_FIELDS.values(),
}
_KEYS = [*_GIB_FIELDS, "flops", "device_names", "link", "sources", *sorted(_NUMBERS)]


def _device(name: str, given: Any, source: str, base: Gpu | None = None) -> Gpu:
    """The device of a mapping as the file has it, laid over `base` where that is known already."""
    if not isinstance(given, Mapping):
        raise UserError(f"{source}: {name}: given {given!r}; must be a mapping of figures, as in hardware.yaml")
    figures: dict[str, Any] = {}
    for key, value in given.items():
        key = str(key)
        if key not in _KEYS:
            raise UserError(f"{source}: {name}: unknown figure '{key}'; must be one of {', '.join(_KEYS)}")
        figures[_GIB_FIELDS.get(key, key)] = _figure(key, value, f"{source}: {name}")
    if base is not None:
        flops = {**base.flops, **figures.get("flops", {})}
        return replace(base, **{**figures, "flops": flops, "sources": {**base.sources, **figures.get("sources", {})}})
    missing = [key for key in ("memory_gib", "flops", "memory_bytes_per_second") if key not in given]
    if missing or not {"bf16", "fp16"} & set(figures["flops"]):
        lacking = ", ".join(missing or ["flops of bf16 or fp16"])
        raise UserError(f"{source}: {name}: no {lacking}; a new device needs memory, 16-bit arithmetic and bandwidth")
    return Gpu(name=name, **figures)


def _figure(key: str, value: Any, where: str) -> Any:
    if key == "device_names":
        return tuple(str(part) for part in (value if isinstance(value, list) else [value]))
    if key == "sources":
        return dict(value) if isinstance(value, Mapping) else {"": str(value)}
    if key == "link":
        if value not in ("nvlink", "pcie"):
            raise UserError(f"{where}: link: given {value!r}; must be nvlink or pcie")
        return value
    if key == "flops":
        return _flops(value, where)
    number = _positive(value, f"{where}: {key}")
    if key == "matmul_share" and number > 1:
        raise UserError(f"{where}: {key}: given {value!r}; must be a share, above 0 and at most 1")
    if key == "gpus_per_node":
        if not number.is_integer():
            raise UserError(f"{where}: {key}: given {value!r}; must be a whole number from 1; a node holds whole GPUs")
        return int(number)
    return int(number * GIB) if key in _GIB_FIELDS else number


def _flops(value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, Mapping) or not value or not set(value) <= set(TYPES):
        raise UserError(f"{where}: flops: given {value!r}; must be FLOP a second by type, of {', '.join(TYPES)}")
    return {str(kind): _positive(number, f"{where}: flops.{kind}") for kind, number in value.items()}


def _positive(value: Any, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < float("inf"):
        raise UserError(f"{where}: given {value!r}; must be a number above 0")
    return float(value)
