"""A deeper or a shallower model, made of the layers of an existing one and written tensor by tensor.

Depth up-scaling is the first k and the last k of n layers, joined into 2k (SOLAR, arXiv:2312.15166). Of layers to leave
out, deep ones before the last are missed least (arXiv:2403.17887).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from dsllm.errors import DsllmError, UserError
from dsllm.model.conversion import Conversion
from dsllm.model.depth import blocks_name, refuse_other_layers, with_layers
from dsllm.model.output_folder import refuse_filled
from dsllm.model.source import Source, build_skeleton
from dsllm.model.source_files import SAFETENSORS, find_folder
from dsllm.spec.layers import chosen_layers, parse_layers

NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
"""Endings of weights and of their indices. The README says what the source is, and not what is made of it."""
NOT_COPIED_NAMES = ("config.json", "README.md", ".gitattributes")


class Move(NamedTuple):
    """A tensor of the new model and that of the source which it is, by their names on disk."""

    new: str
    old: str
    layer: int | None
    """Of the new model; None for what is in no layer."""


class Part(NamedTuple):
    """What of the new model came from where."""

    name: str
    origin: str
    tensors: int
    parameters: int


class Grown(NamedTuple):
    """What became of a source."""

    parts: list[Part]
    unused: list[str]
    """Tensors of its files that are no part of its model, and so not of the new one."""


def grow(name: str, output: Path, layers: str, *, revision: str | None = None, max_shard_bytes: int) -> Grown:
    """Write the model that has `layers` (`0-7,4-11`) of the model `name`, and all else of it, to the folder `output`.

    Returns what came from where. Tensors go from mapped file to file; in memory are copies of those that one file has
    twice, less than `max_shard_bytes`, the size of a file. Raises UserError where the source cannot be had or has no
    such layers, or `output` holds something; on any fault nothing stays behind.
    """
    refuse_filled(output, "the new model")
    source = Source(find_folder(name, revision))
    numbers = chosen_layers(layers, "--layers", source.config.num_hidden_layers, name)
    moves = _moves(source, numbers)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        made = Path(folder) / "model"
        made.mkdir()
        _write_tensors(source, moves, made, max_shard_bytes)
        with_layers(source.config, numbers).save_pretrained(made)
        _copy_other_files(source.folder, made)
        _compare(source, moves, made)
        os.replace(made, output)
    return Grown(_parts(source, moves, layers), source.conversion.unused)


def _moves(source: Source, layers: Sequence[int]) -> list[Move]:
    """Every tensor of the new model, in the order of its files."""
    blocks = blocks_name(source.skeleton)
    skeleton = build_skeleton(with_layers(source.config, layers), str(source.folder))
    refuse_other_layers(source.skeleton, skeleton, layers, str(source.folder))
    # What a name on disk stands for depends on the layers that there are, so that new names are asked of the new model.
    new = Conversion(skeleton, {})
    shared, of_layer = [], defaultdict(list)
    for group in source.conversion.groups:
        for piece, _ in group.pieces:
            if group.first.startswith(f"{blocks}."):
                number, _, rest = group.first.removeprefix(f"{blocks}.").partition(".")
                of_layer[int(number)].append((piece, rest))
            else:
                shared.append(Move(piece, piece, None))
    moved = [
        Move(_renamed(piece, old, number, f"{blocks}.{number}.{rest}", new), piece, number)
        for number, old in enumerate(layers)
        for piece, rest in of_layer[old]
    ]
    return [*shared, *moved]


def _renamed(piece: str, old: int, number: int, parameter: str, new: Conversion) -> str:
    """The name on disk with the layer's number `old` replaced by `number`: of all numbers in it, the one that makes it
    the name of `parameter`."""
    words = piece.split(".")
    for place, word in enumerate(words):
        name = ".".join([*words[:place], str(number), *words[place + 1 :]])
        if word == str(old) and new.parameter_of(name) == parameter:
            return name
    raise UserError(
        f"{piece}: which number in this name of a tensor is the layer's cannot be told; choose another model"
    )


def _write_tensors(source: Source, moves: Sequence[Move], folder: Path, max_shard_bytes: int) -> None:
    """Files of at most `max_shard_bytes`, unless one tensor alone is larger, and the index where there are several."""
    shards, sizes = _shards(source, moves, max_shard_bytes)
    files = [SAFETENSORS]
    if len(shards) > 1:
        stem, suffix = SAFETENSORS.split(".")
        files = [f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" for number in range(1, len(shards) + 1)]
        weight_map = {move.new: file for file, shard in zip(files, shards, strict=True) for move in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, shard in zip(files, shards, strict=True):
        _write_file(source, shard, folder / file)


def _write_file(source: Source, shard: Sequence[Move], file: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    for move in shard:
        tensor = source.tensors.read(move.old)
        # A layer that is taken twice may not be one tensor of two names.
        tensors[move.new] = tensor.clone() if move.old in seen else tensor
        seen.add(move.old)
    save_file(tensors, file, metadata={"format": "pt"})


def _shards(source: Source, moves: Sequence[Move], max_bytes: int) -> tuple[list[list[Move]], list[int]]:
    """The tensors of each file, and the bytes of each."""
    shards: list[list[Move]] = [[]]
    sizes = [0]
    for move in moves:
        size = source.tensors.read(move.old).nbytes
        if shards[-1] and sizes[-1] + size > max_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(move)
        sizes[-1] += size
    return shards, sizes


def _copy_other_files(source: Path, folder: Path) -> None:
    """The tokenizer, the settings of generation, the licence."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(NOT_COPIED) and file.name not in NOT_COPIED_NAMES:
            shutil.copyfile(file, folder / file.name)


def _compare(source: Source, moves: Sequence[Move], folder: Path) -> None:
    """Read the new model back, every tensor of it."""
    again = Source(folder)
    for move in moves:
        found, expected = again.tensors.read(move.new), source.tensors.read(move.old)
        if found.dtype != expected.dtype or not torch.equal(_bits(found), _bits(expected)):
            raise DsllmError(f"{folder}: {move.new} is not {move.old} when it is read back; try another disk")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """So that what is not a number equals itself."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _parts(source: Source, moves: Sequence[Move], layers: str) -> list[Part]:
    """A line for each module outside the layers, and one for each range of layers."""
    parts, start = [], 0
    shared = [move for move in moves if move.layer is None]
    for module, group in itertools.groupby(shared, lambda move: move.new.rpartition(".")[0]):
        parts.append(_part(source, list(group), module, module))
    for numbers in parse_layers(layers, "--layers"):
        of_range = [move for move in moves if move.layer in range(start, start + len(numbers))]
        parts.append(_part(source, of_range, _layers(start, len(numbers)), _layers(numbers.start, len(numbers))))
        start += len(numbers)
    return parts


def _part(source: Source, moves: Sequence[Move], name: str, origin: str) -> Part:
    parameters = sum(source.tensors.shapes[move.old].numel() for move in moves)
    return Part(name, origin, len(moves), parameters)


def _layers(first: int, count: int) -> str:
    return f"layer {first}" if count == 1 else f"layers {first}-{first + count - 1}"
