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
from dsllm.errors import CheckpointError


class HostBuffers:
    """Host memory for the tensors of one rank's checkpoints, kept from one to the next: making it is what takes long.

    On a GPU it is page-locked, so that the copies overlap.
    """

    def __init__(self) -> None:
        self._pin = get_accelerator().device_name() != "cpu"
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def copy(self, key: str, state: Any) -> Any:
        """A copy of nested containers that nothing in training changes; tensors go into the buffers of `key`."""
        copied: dict[tuple[Any, ...], torch.Tensor] = {}

        def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
            # Tied weights are one tensor under two names, and stay one on the disk.
            identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if identity not in copied:
                buffer = self._buffer((key, len(copied)), tensor)
                copied[identity] = buffer.copy_(tensor.detach(), non_blocking=True)
            return copied[identity]

        return _map_tensors(copy_tensor, state)

    @property
    def size_bytes(self) -> int:
        """Of all buffers: what this rank's files will take on the disk, their small parts left out."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _buffer(self, key: tuple[str, int], like: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = _pinned(like) if self._pin else _ordinary(like)
            self._buffers[key] = buffer
        return buffer


def _pinned(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)


def _ordinary(like: torch.Tensor) -> torch.Tensor:
    """From numpy: what torch allocates on a CPU would be measured as memory of the training."""
    return torch.from_numpy(np.empty(like.nbytes, dtype=np.uint8)).view(like.dtype).view(like.shape)


class Snapshot(TorchCheckpointEngine):
    """In the place of DeepSpeed's checkpoint engine: takes its files into host memory instead of writing them."""

    def __init__(self, buffers: HostBuffers) -> None:
        super().__init__()
        self._buffers = buffers
        self.files: dict[Path, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        """Take one file."""
        self.files[Path(path)] = self._buffers.copy(path.rpartition("/")[2], state_dict)

    def finish(self) -> None:
        """Wait for the copies."""
        get_accelerator().synchronize()


def write_files(files: Mapping[Path, Any]) -> dict[Path, FileRecord]:
    """Write states (text as it is, all else by torch), flush them to the disk, and read back what is there.

    Raises CheckpointError where one cannot be written, or the disk holds something else afterwards.
    """
    records = {path: _write(path, content) for path, content in files.items()}
    for path, record in records.items():
        if record_of(path) != record:
            raise CheckpointError(f"{path}: reads back otherwise than it was written")
    for folder in {path.parent for path in files}:
        sync_folder(folder)
    return records


def offloaded_files(checkpoint: Path, rank: int) -> dict[Path, FileRecord]:
    """What DeepSpeed itself has copied of optimizer states on NVMe: those of one rank."""
    folder = checkpoint / "offloaded_tensors" / f"rank{rank:02d}"
    return {path: record_of(path) for path in folder.rglob("*") if path.is_file()}


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
        raise CheckpointError(f"{path}: {_reason(error)}") from error
    return FileRecord(size_bytes=hashing.size_bytes, sha256=hashing.digest.hexdigest())


def _reason(error: BaseException) -> str:
    """The operating system's own word where there is one: torch closes a failed archive with an error of its own."""
    for cause in (error, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return str(error).splitlines()[0]


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
