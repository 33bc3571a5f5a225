"""Every kind of source by its name in the spec."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dsllm.data.sources.messages import no_text
from dsllm.data.sources.piece import Document, Dropped, OpenSource, Piece
from dsllm.spec.sections import Source


def open_source(source: Source, *, skip_bad_lines: bool = False) -> OpenSource:
    """Find the source's input. Raises DataError where there is none, or it is not what the spec says."""
    raise NotImplementedError


def documents(source: Source, *, skip_bad_lines: bool = False) -> Iterator[Document]:
    """Documents of the source that hold more than white space, read in this process.

    Raises DataError for a source that cannot be read, or holds no text at all.
    """
    dropped: Dropped = Counter()
    empty = True
    for piece in open_source(source, skip_bad_lines=skip_bad_lines).pieces(lambda name: None):
        for document in kept_documents(piece, 0, dropped):
            empty = False
            yield document
    if empty:
        raise no_text(source, dropped)


def kept_documents(piece: Piece, min_characters: int, dropped: Dropped) -> Iterator[Document]:
    """Documents of the piece that hold more than white space and are long enough; the others are counted."""
    for document in piece.documents(dropped):
        is_whole = document.begins and document.ends
        if is_whole and not document.text.strip():
            dropped["empty"] += 1
        elif is_whole and len(document.text) < min_characters:
            dropped["too short"] += 1
        else:
            yield document
