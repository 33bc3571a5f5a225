"""A snapshot is written as torch would write the state itself, whatever training does to the state meanwhile."""

from __future__ import annotations

import errno
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dsllm.checkpoint import snapshot as module
from dsllm.checkpoint.manifest import fault_of
from dsllm.checkpoint.snapshot import HostBuffers, Snapshot, write_files
from dsllm.errors import CheckpointError


def state() -> dict[str, Any]:
    """Views of one tensor, a tensor under two names, a scalar, an empty one, and what is no tensor."""
    flat = torch.arange(12.0)
    tied = torch.ones(3, dtype=torch.bfloat16)
    return {
        "module": {"a": flat[:6].view(2, 3), "b": flat[6:], "one": tied, "same": tied, "gone": torch.empty(0)},
        "groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}],
        "step": torch.tensor(7.0),
        "shape": torch.Size([2, 3]),
        "grad": torch.zeros(2, requires_grad=True),
    }


def taken(content: Any, folder: Path, buffers: HostBuffers | None = None) -> Snapshot:
    snapshot = Snapshot(buffers or HostBuffers())
    snapshot.save(content, str(folder / "state.pt"))
    snapshot.allocate()
    return snapshot


def test_what_is_written_is_the_state_at_the_moment_of_the_save(tmp_path: Path) -> None:
    content = state()
    snapshot = taken(content, tmp_path)
    content["groups"][0]["lr"] = 9.0
    snapshot.copy()
    content["module"]["a"].zero_()
    (record,) = write_files(snapshot.files).values()
    found, expected = torch.load(tmp_path / "state.pt", weights_only=True), state()
    assert found["groups"] == expected["groups"]
    assert found["shape"] == (2, 3)
    for name, tensor in expected["module"].items():
        assert torch.equal(found["module"][name], tensor), name
    assert found["step"] == 7.0
    assert fault_of(tmp_path, "state.pt", record) is None


def test_what_shares_memory_is_stored_once_as_torch_does(tmp_path: Path) -> None:
    snapshot = taken(state(), tmp_path)
    snapshot.copy()
    write_files(snapshot.files)
    torch.save(state(), tmp_path / "torch.pt")
    assert stored_bytes(tmp_path / "state.pt") == stored_bytes(tmp_path / "torch.pt")
    found = torch.load(tmp_path / "state.pt", weights_only=True)["module"]
    assert found["one"].data_ptr() == found["same"].data_ptr()


def stored_bytes(path: Path) -> list[int]:
    """Of each tensor storage in torch's archive."""
    return sorted(entry.file_size for entry in zipfile.ZipFile(path).infolist() if "/data/" in entry.filename)


def test_buffers_are_made_once_and_again_only_for_another_size(tmp_path: Path) -> None:
    buffers = HostBuffers()
    first = taken(state(), tmp_path, buffers).files[tmp_path / "state.pt"]["module"]["a"]
    again = taken(state(), tmp_path, buffers).files[tmp_path / "state.pt"]["module"]["a"]
    assert first.data_ptr() == again.data_ptr()
    assert buffers.size_bytes == 12 * 4 + 3 * 2 + 4 + 2 * 4
    larger = {**state(), "module": {"a": torch.zeros(100)}}
    assert taken(larger, tmp_path, buffers).files[tmp_path / "state.pt"]["module"]["a"].shape == (100,)


def test_a_file_that_cannot_be_written_is_named_with_the_systems_reason(tmp_path: Path) -> None:
    snapshot = taken(state(), tmp_path / "not there")
    snapshot.copy()
    with pytest.raises(CheckpointError, match=r"not there/state\.pt could not be written: No such file or directory$"):
        write_files(snapshot.files)


def test_a_disk_that_fills_up_within_a_tensor_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    snapshot = taken(state(), tmp_path)
    snapshot.copy()
    monkeypatch.setattr(module._HashingFile, "write", full)  # inside torch's archive, which has an error of its own
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_files(snapshot.files)


def test_a_disk_that_holds_something_else_than_was_written_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = taken(state(), tmp_path)
    snapshot.copy()
    sync = module.os.fsync

    def spoil(descriptor: int) -> None:
        sync(descriptor)
        module.os.pwrite(descriptor, b"\0", 100)

    monkeypatch.setattr(module.os, "fsync", spoil)
    with pytest.raises(CheckpointError, match=r"state\.pt: reads back otherwise than it was written"):
        write_files(snapshot.files)
