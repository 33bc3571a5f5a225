"""Where an existing model lies, and its tensors as they lie on disk: looked up by name, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsllm.errors import UserError, first_line

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""All that is wanted of a repository: configuration, tokenizer, and weights in the format that runs no code."""
_MISSING = "copy it beside the others, or fetch the model again"


def find_folder(name: str, revision: str | None = None, *, may_download: bool = True) -> Path:
    """The folder of a model: a local one, or of the Hub's copy, downloaded where it is not there yet and that may be.

    Raises UserError for a folder that is none, holds a run or has no configuration, and for a name that cannot be had.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith(("/", "./", "../", "~")):
            raise UserError(f"{name}: there is no such folder; give a Hugging Face folder, or a name on the Hub")
        folder = _download(name, revision) if may_download else _downloaded(name, revision)
    elif (folder / "checkpoints").is_dir() or folder.name.startswith("global_step"):
        raise UserError(f"{name}: a run, whose weights lie in DeepSpeed's layout; first run dsllm export {name} OUT")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: there is no config.json in it; give a folder that save_pretrained or dsllm export wrote"
        )
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's tensors: safetensors, or else torch's own, one or as an index lists them.

    Raises UserError where there are none, or one of the index's is not there.
    """
    for single in (SAFETENSORS, TORCH):
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _indexed(index)
    raise UserError(
        f"{folder}: there are no weights in it, neither {SAFETENSORS} nor {TORCH}, nor an index of either; "
        "give a folder that has them"
    )


class Tensors:
    """The tensors of some files, by their names on disk. Only names and shapes are read at first."""

    def __init__(self, files: list[Path]) -> None:
        """Raises UserError for a file that is damaged."""
        self.shapes: dict[str, torch.Size] = {}
        self._readers: dict[str, Callable[[], torch.Tensor]] = {}
        for file in files:
            try:
                (self._add_safetensors if file.suffix == ".safetensors" else self._add_torch)(file)
            except OSError:
                raise
            except Exception as error:  # of many kinds: each library's own, and pickle's
                raise UserError(f"{file}: cannot be read as weights ({first_line(error)}); copy it again") from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU: a view of the mapped file, which takes no memory that the system cannot take back."""
        return self._readers[name]()

    def _add_safetensors(self, file: Path) -> None:
        from safetensors import safe_open

        handle: Any = safe_open(file, framework="pt")
        for name in handle.keys():  # noqa: SIM118 - no mapping
            self.shapes[name] = torch.Size(handle.get_slice(name).get_shape())
            self._readers[name] = lambda name=name: handle.get_tensor(name)

    def _add_torch(self, file: Path) -> None:
        for name, tensor in torch.load(file, map_location="cpu", mmap=True, weights_only=True).items():
            self.shapes[name] = tensor.shape
            self._readers[name] = lambda tensor=tensor: tensor


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*HUB_FILES, "*.bin"]))
    except Exception as error:  # of many kinds: no network, no such name or revision, a name that needs a login
        raise UserError(
            f"{name}: no folder of that name, and the Hub gives no such model ({first_line(error)}); check the name "
            "and the network, or give a local folder"
        ) from error
    return folder


def _downloaded(name: str, revision: str | None) -> Path:
    """What hf download has left in the Hub's cache on this machine."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        is_whole = any((folder / file).is_file() for one in (SAFETENSORS, TORCH) for file in (one, f"{one}.index.json"))
    except (OSError, ValueError):  # no such thing in the cache, or nothing that could be a name
        is_whole = False
    if not is_whole:
        options = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{name}: no folder of that name, and not downloaded here, for which every rank would wait; first run "
            f"hf download {name}{options} on the host of rank 0"
        )
    return folder


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no list of files and their tensors ({first_line(error)}); {_MISSING}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index}: names {missing[0]}, which is not there ({len(missing)} of {len(names)}); {_MISSING}")
    return [index.parent / name for name in names]
