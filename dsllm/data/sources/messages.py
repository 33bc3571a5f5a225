"""What messages say of a source."""

from __future__ import annotations

from dsllm.data.sources.piece import Dropped
from dsllm.errors import DataError
from dsllm.spec.sections import Source


def no_text(source: Source, dropped: Dropped) -> DataError:
    """The error for a source of which nothing was kept."""
    if not dropped:
        return DataError(f"{describe(source)}: there is no text in it; point it to files that hold some, or remove it")
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items()))
    return DataError(
        f"{describe(source)}: every document was dropped ({reasons}); point it to other text, or lower "
        f"data.min_document_characters"
    )


def describe(source: Source) -> str:
    """The source as messages name it: `text source 'corpus/*.txt'`."""
    if source.kind == "python-stdlib":
        return "python-stdlib source"
    name = source.name if source.kind == "huggingface" else source.path
    return f"{source.kind} source {name!r}"
