"""Where text comes from: every source is an iterator of documents, in an order that never changes."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsllm.errors import DataError
from dsllm.spec.sections import HuggingFaceSource, PythonStdlibSource, Source, TextSource

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_SUFFIXES = (".txt", ".md", ".py")
_STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Document:
    """One text. `identity` names it alike on every machine; whether it is held out depends on nothing else."""

    identity: str
    text: str


def documents(source: Source) -> Iterator[Document]:
    """Documents of the source that hold more than white space.

    Raises DataError for a source that cannot be read, or holds no text at all.
    """
    empty = True
    for document in _READERS[source.kind](source):
        if document.text.strip():
            empty = False
            yield document
    if empty:
        raise DataError(f"{describe(source)}: there is no text in it; point it to files that hold some, or remove it")


def describe(source: Source) -> str:
    """The source as messages name it: `text source 'corpus/*.txt'`."""
    name = {"python-stdlib": None, "text": "path", "huggingface": "name"}[source.kind]
    return f"{source.kind} source {getattr(source, name)!r}" if name else f"{source.kind} source"


def _stdlib_documents(source: PythonStdlibSource) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in root.rglob("*.py") if not _STDLIB_LEFT_OUT.intersection(file.relative_to(root).parts)]
    return _file_documents(source, files, root)


def _text_documents(source: TextSource) -> Iterator[Document]:
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and not _is_hidden(file, path)]
        return _file_documents(source, files, path)
    if path.is_file():
        return _file_documents(source, [path], path.parent)
    files = [Path(match) for match in glob.glob(str(path), recursive=True)]
    if not files:
        raise DataError(f"{describe(source)}: no file, folder or match of that name; correct data.sources' path")
    return _file_documents(source, [file for file in files if file.is_file()], _folder_above_wildcards(path))


def _file_documents(source: Source, files: Iterable[Path], root: Path) -> Iterator[Document]:
    """A document for each file, sorted; identities are paths below `root`, so that a moved folder splits alike."""
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        yield Document(f"{source.kind}:{name}", _read_utf8(file))


def _read_utf8(file: Path) -> str:
    """The file's text, byte for byte: no newline is translated."""
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: byte {error.start} is not valid UTF-8 ({error.reason}); convert it to UTF-8, or leave it out"
        ) from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); mend that, or leave the file out") from error


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _folder_above_wildcards(pattern: Path) -> Path:
    """`corpus/*/a.txt` -> `corpus`."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))


def _huggingface_documents(source: HuggingFaceSource) -> Iterator[Document]:
    dataset = _open_dataset(source)
    if source.text_column not in dataset.column_names:
        raise DataError(
            f"{describe(source)}: no column {source.text_column!r}; "
            f"set text_column to one of {', '.join(dataset.column_names)}"
        )
    prefix = f"huggingface:{Path(source.name).name}:{source.subset or ''}:{source.split}"
    for index, row in enumerate(dataset.select_columns([source.text_column])):
        yield Document(f"{prefix}:{index}", _cell_text(row[source.text_column], source, index))


def _cell_text(cell: object, source: HuggingFaceSource, index: int) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise DataError(
            f"{describe(source)}: row {index} of column {source.text_column!r} holds {type(cell).__name__}; "
            f"set text_column to a column of text"
        )
    return cell


def _open_dataset(source: HuggingFaceSource) -> Dataset:
    """The split, from a folder written by `save_to_disk` or through the Hub's cache."""
    from datasets import load_from_disk

    folder = Path(source.name).expanduser()
    if (folder / "state.json").is_file():
        return load_from_disk(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = load_from_disk(folder)
        if source.split not in splits:
            raise DataError(
                f"{describe(source)}: no split {source.split!r}; set split to one of {', '.join(map(str, splits))}"
            )
        return splits[source.split]
    return _load_from_hub(source)


def _load_from_hub(source: HuggingFaceSource) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(source.name, source.subset, split=source.split, revision=source.revision)
    # FileNotFoundError: neither on the Hub nor here. ConnectionError: no network. ValueError: no such subset or split.
    except (OSError, ValueError) as error:
        raise DataError(
            f"{describe(source)}: cannot be loaded ({' '.join(str(error).split())}); check the name and the network, "
            f"or set name to a folder written by datasets' save_to_disk"
        ) from error


_READERS: dict[str, Callable[[Any], Iterator[Document]]] = {
    "python-stdlib": _stdlib_documents,
    "text": _text_documents,
    "huggingface": _huggingface_documents,
}
