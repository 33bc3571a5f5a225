"""What messages say of a source."""

from __future__ import annotations

from collections.abc import Iterable

from dsllm.data.sources.piece import Dropped
from dsllm.errors import DataError, DsllmError, one_line
from dsllm.spec.sections import Source


def no_text(source: Source, dropped: Dropped) -> DataError:
    """The error for a source of which nothing was kept."""
    if not dropped:
        return DataError(f"{describe(source)}: there is no text in it; point it to files that hold some, or remove it")
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items()))
    return DataError(
        f"{describe(source)}: every document was dropped ({reasons}); point it to other text, or remove it"
    )


def no_file(source: Source) -> DataError:
    """The error for a path that names nothing."""
    return DataError(f"{describe(source)}: no file, folder or match of that name; correct data.sources' path")


def no_column(where: str, column: str, existing: Iterable[str]) -> DataError:
    """The error for a column that is not there."""
    return DataError(f"{where}: no column {column!r}; set text_column to one of {', '.join(existing)}")


def not_text(where: str, column: str, holds: object) -> DataError:
    """The error for a column, or a cell of it, that holds something else."""
    return DataError(f"{where}: column {column!r} holds {holds}; set text_column to a column of text")


def broke_off(source: Source, error: Exception) -> DsllmError:
    """The error for a dataset that was opened, and cannot be read on."""
    return DsllmError(
        f"{describe(source)}: reading broke off ({one_line(error)}); what is prepared is kept: "
        f"the same command goes on from there"
    )


def describe(source: Source) -> str:
    """The source as messages name it: `text source 'corpus/*.txt'`."""
    if source.kind == "python-stdlib":
        return "python-stdlib source"
    name = source.name if source.kind == "huggingface" else source.path
    return f"{source.kind} source {name!r}"
