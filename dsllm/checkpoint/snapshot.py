"""What DeepSpeed would write, copied to host memory, and written from there while training goes on."""

from __future__ import annotations

import copy
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from dsllm.checkpoint.layout import sync_folder
from dsllm.checkpoint.manifest import FileRecord, record_of
from dsllm.errors import CheckpointError, first_line


class HostBuffers:
    """Host memory for the tensors of one rank's checkpoints, kept from one to the next: making it is what takes long.

    For a GPU it is page-locked, so that the device copies into it by itself.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    @property
    def size_bytes(self) -> int:
        """Of all buffers: what this rank's files will take on the disk, their small parts left out."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def get(self, key: tuple[str, int], size_bytes: int) -> torch.Tensor:
        """The buffer of that key, a vector of bytes."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.nbytes != size_bytes:
            buffer = self._buffers[key] = _new_buffer(size_bytes)
        return buffer


class Snapshot(TorchCheckpointEngine):
    """In the place of DeepSpeed's checkpoint engine: notes down what it would write, to be copied and written later.

    Between its `save` and the next update of the weights nothing changes in the tensors, so that `copy` runs on another
    thread while the next forward and backward go on.
    """

    def __init__(self, buffers: HostBuffers) -> None:
        super().__init__()
        self._buffers = buffers
        self._sources: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._device: int | None = None
        self._ready: Any = None
        self.files: dict[Path, Any] = {}
        """What is to be written; its tensors are the live ones until `allocate`, and in host memory after `copy`."""

    def save(self, state_dict: Any, path: str) -> None:
        """Note down one file. What is not a tensor is copied at once."""
        self.files[Path(path)] = _map_tensors(torch.Tensor.detach, state_dict)

    def allocate(self) -> None:
        """Once all is noted down: host memory for it. On a GPU the copies follow what has been asked of it so far.

        Raises what the system does where there is not enough.
        """
        for path, state in self.files.items():
            self.files[path] = self._in_buffers(path.name, state)
        if _has_device():
            self._device = get_accelerator().current_device()
            self._ready = get_accelerator().Event()
            self._ready.record()

    def copy(self) -> None:
        """Fill the buffers; on any thread."""
        if self._device is None:
            for buffer, tensor in self._sources:
                buffer.copy_(tensor)
        else:
            self._copy_from_device()
        self._sources.clear()

    def _in_buffers(self, name: str, state: Any) -> Any:
        """The state of one file with its tensors in host memory, which is not filled yet."""
        buffers: dict[int, torch.Tensor] = {}

        def in_buffer(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.numel() == 0:  # what stage 3 leaves in the place of a parameter
                return torch.empty(tensor.shape, dtype=tensor.dtype)
            # As torch saves them: what shares memory, such as tied weights or parts of a flat tensor, is stored once.
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in buffers:
                buffer = self._buffers.get((name, len(buffers)), storage.nbytes())
                buffers[storage.data_ptr()] = buffer
                self._sources.append((buffer, torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)))
            place = buffers[storage.data_ptr()].untyped_storage()
            return torch.empty(0, dtype=tensor.dtype).set_(
                place, tensor.storage_offset(), tensor.shape, tensor.stride()
            )

        return _map_tensors(in_buffer, state)

    def _copy_from_device(self) -> None:
        accelerator = get_accelerator()
        accelerator.set_device(self._device)  # each thread has a device of its own
        stream = accelerator.Stream()
        stream.wait_event(self._ready)
        with accelerator.stream(stream):
            for buffer, tensor in self._sources:
                buffer.copy_(tensor, non_blocking=True)
        stream.synchronize()


def _has_device() -> bool:
    return bool(get_accelerator().device_name() != "cpu")


def _new_buffer(size_bytes: int) -> torch.Tensor:
    if _has_device():
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    # From numpy: what torch allocates on a CPU would be measured as memory of the training.
    return torch.from_numpy(np.empty(size_bytes, dtype=np.uint8))


def write_files(files: Mapping[Path, Any]) -> dict[Path, FileRecord]:
    """Write states (text as it is, all else by torch), flush them to the disk, and read back what is there.

    Raises CheckpointError where one cannot be written, or the disk holds something else afterwards.
    """
    records = {path: _write(path, content) for path, content in files.items()}
    for path, record in records.items():
        if record_of(path) != record:
            raise CheckpointError(f"{path}: reads back otherwise than it was written", cause="disk")
    for folder in {path.parent for path in files}:
        sync_folder(folder)
    return records


def offloaded_files(checkpoint: Path, rank: int) -> dict[Path, FileRecord]:
    """What DeepSpeed itself has copied of optimizer states on NVMe: those of one rank."""
    folder = checkpoint / "offloaded_tensors" / f"rank{rank:02d}"
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {path: record_of(path) for path in paths}


def _write(path: Path, content: Any) -> FileRecord:
    try:
        with path.open("wb", buffering=0) as file:
            hashing = _HashingFile(file)
            if isinstance(content, str):
                hashing.write(content.encode())
            else:
                torch.save(content, hashing)
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} could not be written: {_reason(error)}") from error
    return FileRecord(size_bytes=hashing.size_bytes, sha256=hashing.digest.hexdigest())


def _reason(error: BaseException) -> str:
    """The operating system's own word where there is one: torch closes a failed archive with an error of its own."""
    for cause in (error, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return first_line(error)


class _HashingFile:
    """What torch writes an archive to: an unbuffered file, and its checksum. Both let other threads run meanwhile."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: Any) -> int:
        """All of `data`: an unbuffered file may take less at a time."""
        left = memoryview(data).cast("B")
        self.digest.update(left)
        self.size_bytes += len(left)
        while left:
            left = left[self._file.write(left) :]
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing is held back."""


def _map_tensors(change: Any, value: Any) -> Any:
    """The same containers with other tensors; everything else is copied."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        mapped = copy.copy(value)
        mapped.update((name, _map_tensors(change, child)) for name, child in value.items())
        return mapped
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(change, child) for child in value)
    return copy.deepcopy(value)
