"""What a device was measured to take beside a run's tensors, in a small JSON file by the names that devices report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsllm.errors import UserError
from dsllm.plan.hardware import CPU, Gpu, bytes_beside, gpu_of_device


@dataclass(frozen=True)
class DeviceConstants:
    """The runtime's own share of a device, in the place of the catalogue's constant."""

    device: str
    """As the device calls itself, or `cpu`."""
    runtime_bytes: int
    """Held beside what torch's allocator takes: the context, kernels' workspaces, communication buffers; on the CPU
    the libraries' own resident memory."""
    reserved_ratio: float | None
    """What the allocator took from the device at most, over what tensors took of it at most, 1 or more: blocks are
    rounded up and leave gaps. None where the allocator does not tell."""
    source: str
    """Where it was measured: `dsllm calibrate`, or the run's folder."""

    def beside(self, tensor_bytes: int) -> int:
        """Bytes on the device that are not tensors, when tensors take that many."""
        return bytes_beside(tensor_bytes, self.runtime_bytes, self.reserved_ratio or 1.0)


def read_constants(path: Path) -> dict[str, DeviceConstants]:
    """By the devices' names; empty where there is no such file. Raises UserError for one of another form."""
    if not path.exists():
        return {}
    document = _read_json(path)
    try:
        found = [DeviceConstants(device=name, **given) for name, given in document["devices"].items()]
        if not all(_is_sound(constants) for constants in found):
            raise ValueError("a size that cannot be")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not what dsllm calibrate writes ({error}); delete it, and calibrate again") from error
    return {constants.device: constants for constants in found}


def write_constants(path: Path, constants: DeviceConstants) -> None:
    """Keep them beside those of other devices; what was known of this device before is replaced."""
    known = {**read_constants(path), constants.device: constants}
    document = {"devices": {name: _without_name(one) for name, one in sorted(known.items())}}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def constants_of_run(path: Path) -> DeviceConstants:
    """What a run's `memory.json` says of its device. Raises UserError where nothing of the kind was measured there."""
    document = _read_json(path)
    try:
        measured = document["measured"]
        runtime_bytes, peak_bytes = int(measured["runtime_bytes"]), max(measured["peak_bytes"].values())
        ratio = reserved_ratio(measured["reserved_bytes"], peak_bytes)
        found = DeviceConstants(str(document["device"]), runtime_bytes, ratio, str(path.parent))
        if not _is_sound(found):
            raise ValueError("a size that cannot be")
        return found
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: no memory beside tensors was measured there; take a run on a GPU, or calibrate without --from"
        ) from error


def reserved_ratio(reserved_bytes: int | None, tensor_bytes: int) -> float | None:
    """Reserved over allocated peak, never below 1; None where either is unknown."""
    return max(1.0, round(reserved_bytes / tensor_bytes, 4)) if reserved_bytes and tensor_bytes else None


def constants_of_gpu(known: Mapping[str, DeviceConstants], gpu: Gpu) -> DeviceConstants | None:
    """Those of a device that is `gpu`, of the catalogue or of a user; of several, the one whose name comes first."""
    return next((known[name] for name in sorted(known) if gpu_of_device(name, [gpu])), None)


def with_constants(gpu: Gpu, known: Mapping[str, DeviceConstants]) -> Gpu:
    """The same with the runtime's share, and the allocator's gaps, as calibrated."""
    constants = known.get(CPU) if gpu.is_cpu else constants_of_gpu(known, gpu)
    if constants is None:
        return gpu
    return replace(gpu, runtime_bytes=constants.runtime_bytes, reserved_ratio=constants.reserved_ratio or 1.0)


def _without_name(constants: DeviceConstants) -> dict[str, Any]:
    return {key: value for key, value in asdict(constants).items() if key != "device"}


def _is_sound(constants: DeviceConstants) -> bool:
    ratio = constants.reserved_ratio
    return constants.runtime_bytes >= 0 and (ratio is None or ratio >= 1.0)


def _read_json(path: Path) -> Any:
    """Raises UserError for a file that cannot be read, or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}; mend it, or delete it and calibrate again") from error
