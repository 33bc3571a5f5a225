"""Tokenized pieces on disk: what preparation has finished, so that it goes on where it was interrupted.

A piece is one `.npz` file, which holds a checksum of each array, under a name that changes with the piece's input. It
is written under a temporary name and renamed, so that a file of that name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsllm.data.shards import Tokens
from dsllm.data.sources.piece import KEY_BYTES, Piece, State

_TEMPORARY = ".tmp"


@dataclass(frozen=True)
class EncodedPiece:
    """Token ids of a piece. Its *stretches* are its documents, or what of a long document lies in it.

    A document that ends in the piece has end-of-text behind it.
    """

    name: str
    """Of the piece, as its source has it."""
    tokens: Tokens
    """All ids, one stretch after the other."""
    starts: npt.NDArray[np.int64]
    """(stretches,): where each begins in `tokens`."""
    begins: npt.NDArray[np.bool_]
    """(stretches,): false where it goes on with the document of the stretch before, which may lie in another piece."""
    keys: npt.NDArray[np.uint8]
    """(stretches, KEY_BYTES): key of the whole document."""
    text_bytes: npt.NDArray[np.int64]
    """(stretches,): UTF-8 bytes that it stands for."""
    dropped: dict[str, int]
    """Documents left out, by reason."""
    state: State | None
    """Where a stream stands behind it."""

    @property
    def num_documents(self) -> int:
        return int(self.begins.sum())


@dataclass(frozen=True)
class PieceFile:
    """Where a piece is kept; `index` is its place among the pieces of its source."""

    folder: Path
    label: str
    index: int
    name: str
    stamp: str

    @property
    def path(self) -> Path:
        digest = hashlib.blake2b(
            f"{self.name}\n{self.stamp}".encode("utf-8", "surrogateescape"), digest_size=8
        ).hexdigest()
        return self.folder / self.label / f"{self.index:06d}-{digest}.npz"

    @classmethod
    def of(cls, folder: Path, label: str, index: int, piece: Piece) -> PieceFile:
        return cls(folder, label, index, piece.name, piece.stamp)


def save_piece(path: Path, piece: EncodedPiece) -> None:
    """Write the piece, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")
    facts = json.dumps({"name": piece.name, "dropped": piece.dropped, "state": piece.state}).encode()
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                tokens=piece.tokens,
                starts=piece.starts,
                begins=piece.begins,
                keys=piece.keys,
                text_bytes=piece.text_bytes,
                facts=np.frombuffer(facts, np.uint8),
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_piece(path: Path) -> EncodedPiece:
    """A piece that `save_piece` wrote. Raises BadPieceError where the file is damaged, as after a power cut."""
    with _opened(path) as arrays:
        facts = json.loads(arrays["facts"].tobytes())
        return EncodedPiece(
            tokens=arrays["tokens"],
            starts=arrays["starts"],
            begins=arrays["begins"],
            keys=arrays["keys"],
            text_bytes=arrays["text_bytes"],
            **facts,
        )


def load_keys(path: Path) -> npt.NDArray[np.uint8]:
    """Keys of the documents that begin in a piece, (documents, KEY_BYTES), without reading its tokens."""
    with _opened(path) as arrays:
        keys: npt.NDArray[np.uint8] = arrays["keys"][arrays["begins"]]
        return keys.reshape(-1, KEY_BYTES)


def load_states(folder: Path) -> dict[str, State | None]:
    """By the name of every piece in a folder, where its stream stood behind it. Damaged pieces are deleted."""
    states: dict[str, State | None] = {}
    for path in folder.glob("*.npz"):
        try:
            with _opened(path) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
            states[facts["name"]] = facts["state"]
        except BadPieceError:
            path.unlink()
    return states


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left half-written."""
    for path in folder.rglob(f"*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


class BadPieceError(Exception):
    """A piece whose file is damaged: it must be made again."""


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The arrays of a file; whatever is wrong with it, when it is opened or read, is a BadPieceError."""
    try:
        with np.load(path) as arrays:
            yield arrays
    except OSError:
        raise
    except Exception as error:  # zipfile and numpy have many for as many kinds of damage
        raise BadPieceError(str(path)) from error
