"""Files of a source: what a path in the spec stands for, and their bytes, unpacked where they are compressed."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from dsllm.data.sources.messages import no_file, no_text
from dsllm.data.sources.piece import Dropped
from dsllm.errors import DataError
from dsllm.spec.sections import JsonlSource, ParquetSource, Source, TextSource

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of a source. `name` is its path below the source's root, so that a moved folder gives the same names."""

    path: str
    name: str
    size_bytes: int
    stamp: str
    """Changes when the file does."""

    @property
    def codec(self) -> str | None:
        """How it is compressed, by its name; None where it is not."""
        return _CODECS.get(Path(self.path).suffix)


def find_files(source: TextSource | JsonlSource | ParquetSource, suffixes: tuple[str, ...]) -> list[FoundFile]:
    """Files of the source's path, sorted by name: the file itself, those of a glob, or those of a folder with one of
    the suffixes, hidden ones left out. Raises DataError where there are none, or a folder cannot be read."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        return describe_files(source, (file for file in _visible_files(path) if file.name.endswith(suffixes)), path)
    if path.exists():
        return describe_files(source, [path], path.parent)
    matches = [Path(match) for match in glob.iglob(str(path), recursive=True)]
    if not matches:
        raise no_file(source)
    return describe_files(source, matches, _folder_above_wildcards(path))


def describe_files(source: Source, paths: Iterable[Path], root: Path) -> list[FoundFile]:
    """The files among the paths, sorted by their names below `root`. Raises DataError where there are none."""
    found = [_described(path, root) for path in paths if not path.is_dir()]
    if not found:
        raise no_text(source, Dropped())
    return sorted(found, key=lambda file: file.name)


def unreadable(path: str, error: OSError) -> DataError:
    """The error for a file that the system refuses to give."""
    reason = error.strerror or error
    return DataError(f"{path}: cannot be read ({reason}); mend that, or leave the file out")


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def tell(self) -> int: ...


class ByteStream:
    """The bytes of a file from its start, unpacked; `stored_bytes` counts those of the file itself."""

    def __init__(self, file: FoundFile, unpacked: _Readable, stored: _Readable) -> None:
        self._file = file
        self._unpacked = unpacked
        self._stored = stored
        self.position = 0
        """Bytes that were read or skipped."""

    @property
    def stored_bytes(self) -> int:
        return min(self._stored.tell(), self._file.size_bytes)

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end. Raises DataError for a file that is damaged."""
        blocks: list[bytes] = []
        while size > 0 and (block := self._read(min(size, _BLOCK_BYTES))):
            blocks.append(block)
            size -= len(block)
        return b"".join(blocks)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes `[start, stop)`; those before are passed over, and cannot be read any more."""
        while self.position < start and self._read(min(start - self.position, _BLOCK_BYTES)):
            pass
        return self.read(stop - start)

    def blocks(self) -> Iterator[bytes]:
        """All that follows."""
        while block := self._read(_BLOCK_BYTES):
            yield block

    def _read(self, size: int) -> bytes:
        try:
            block = self._unpacked.read(size)
        except OSError as error:
            raise _damaged(self._file, error) from error
        self.position += len(block)
        return block


@contextmanager
def opened(file: FoundFile) -> Iterator[ByteStream]:
    """The file's bytes. Raises DataError where it cannot be read or unpacked."""
    with ExitStack() as stack:
        stored = stack.enter_context(open_plain(file))
        if file.codec is None:
            yield ByteStream(file, stored, stored)
            return
        if file.size_bytes == 0:
            raise _cut_short(file)
        from pyarrow import CompressedInputStream

        yield ByteStream(file, stack.enter_context(CompressedInputStream(stored, file.codec)), stored)


def open_plain(file: FoundFile) -> BinaryIO:
    """The file as it is stored."""
    try:
        return open(file.path, "rb")
    except OSError as error:
        raise unreadable(file.path, error) from error


def read_range(file: FoundFile, start: int, stop: int) -> bytes:
    """Bytes `[start, stop)` of a file that is not compressed."""
    with open_plain(file) as stream:
        try:
            stream.seek(start)
            content = stream.read(stop - start)
        except OSError as error:
            raise unreadable(file.path, error) from error
    if len(content) != stop - start:
        raise DataError(f"{file.path}: became shorter while it was read; prepare again when nothing writes to it")
    return content


def _damaged(file: FoundFile, error: OSError) -> DataError:
    if file.codec is None:
        return unreadable(file.path, error)
    if "Truncated" in str(error):  # pyarrow has no error of its own for it
        return _cut_short(file)
    return DataError(f"{file.path}: cannot be unpacked ({error}); fetch it again, or name it after what it is")


def _cut_short(file: FoundFile) -> DataError:
    return DataError(f"{file.path}: ends in the middle of its compressed data; fetch it again, whole")


def _described(path: Path, root: Path) -> FoundFile:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # its name goes into messages, and into what is stored of a piece
        raise DataError(f"{str(path)!r}: the name is not UTF-8; rename the file, or the folder it is in") from error
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(str(path), error) from error
    name = path.relative_to(root).as_posix()
    return FoundFile(str(path), name, status.st_size, f"{status.st_size}:{status.st_mtime_ns}")


def _visible_files(root: Path) -> Iterator[Path]:
    """Files below a folder, hidden ones left out; links to folders are followed, as `**` in a glob follows them."""

    def refuse(error: OSError) -> None:
        raise unreadable(str(error.filename), error) from error

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        visible = (Path(folder, name) for name in folders if not name.startswith("."))
        folders[:] = [path.name for path in visible if not _leads_back(path)]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _leads_back(folder: Path) -> bool:
    """Whether it is a link to a folder that it lies in, which following would never end."""
    return os.path.islink(folder) and any(folder.samefile(above) for above in folder.absolute().parents)


def _folder_above_wildcards(pattern: Path) -> Path:
    """`corpus/*/a.txt` -> `corpus`."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
