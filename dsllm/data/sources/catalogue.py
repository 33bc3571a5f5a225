"""Every kind of source by its name in the spec."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dsllm.data.sources.messages import no_text
from dsllm.data.sources.piece import Document, Dropped, OpenSource, Piece
from dsllm.spec.sections import Source


def open_source(source: Source, *, skip_bad_lines: bool = False, piece_bytes: int | None = None) -> OpenSource:
    """Find the source's input, in pieces of about PIECE_BYTES, or `piece_bytes`.

    Raises DataError where there is none, or it is not what the spec says. Each kind imports its own libraries, so that
    text needs none.
    """
    match source.kind:
        case "python-stdlib":
            from dsllm.data.sources.text import open_stdlib

            return open_stdlib(source, piece_bytes)
        case "text":
            from dsllm.data.sources.text import open_text

            return open_text(source, piece_bytes)
        case "jsonl":
            from dsllm.data.sources.jsonl import open_jsonl

            return open_jsonl(source, skip_bad_lines=skip_bad_lines, piece_bytes=piece_bytes)
        case "parquet":
            from dsllm.data.sources.parquet import open_parquet

            return open_parquet(source, piece_bytes)
        case "huggingface":
            from dsllm.data.sources.huggingface import open_huggingface

            return open_huggingface(source, piece_bytes)
        case "deeplake":
            from dsllm.data.sources.deeplake import open_deeplake

            return open_deeplake(source, piece_bytes)


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
    """Documents of the piece that hold more than white space and are long enough; the others are counted.

    Of a long one all parts are kept, or none; it is counted where it begins.
    """
    for document in piece.documents(dropped):
        if document.is_blank:
            dropped["empty"] += document.begins
        elif document.characters < min_characters:
            dropped["too short"] += document.begins
        else:
            yield document
