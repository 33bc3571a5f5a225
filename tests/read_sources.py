"""How the tests of sources read them: piece by piece, in any order, in other processes, and again after a stop."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor

from dsllm.data.sources.piece import Document, Dropped, OpenSource, Piece, text_key


def pieces_of(source: OpenSource) -> list[Piece]:
    """All pieces, none of them known."""
    return list(source.pieces(lambda name: None))


def read(source: OpenSource, dropped: Dropped | None = None) -> list[tuple[str, str]]:
    """Identity and text of every document. The pieces are pickled and read backwards, so that none needs another."""
    pieces = pieces_of(source)
    assert len({piece.name for piece in pieces}) == len(pieces)
    assert source.size_bytes is None or sum(piece.size_bytes for piece in pieces) <= source.size_bytes
    read_backwards = [documents_of(piece, dropped) for piece in reversed(pieces)]
    return whole([document for documents in reversed(read_backwards) for document in documents])


def documents_of(piece: Piece, dropped: Dropped | None = None) -> list[Document]:
    """A piece's documents, as a process reads them that it was sent to."""
    return list(pickle.loads(pickle.dumps(piece)).documents(Counter() if dropped is None else dropped))


def whole(documents: Iterable[Document]) -> list[tuple[str, str]]:
    """Documents with their parts joined; every part must know the key of the whole."""
    found: list[tuple[str, str]] = []
    parts: list[Document] = []
    for document in documents:
        assert document.begins == (not parts), "a document begins where the one before it has ended"
        parts.append(document)
        if document.ends:
            assert len({part.identity for part in parts}) == 1
            text = "".join(part.text for part in parts)
            assert {part.key for part in parts} == {text_key(text.encode())}
            found.append((parts[0].identity, text))
            parts = []
    assert not parts, "the last document ends"
    return found


def read_in_processes(source: OpenSource) -> list[tuple[str, str]]:
    """The same as `read`, in two processes that were started afresh."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        found = list(pool.map(documents_of, pieces_of(source)))
    return whole([document for documents in found for document in documents])


def assert_goes_on_anywhere(source: OpenSource, stops: Sequence[int] | None = None) -> None:
    """However many of the first pieces are known, and known again, all are the same and the others hold the same."""
    pieces = pieces_of(source)
    facts = [(piece.name, piece.stamp, piece.size_bytes) for piece in pieces]
    texts = [documents_of(piece) for piece in pieces]
    for stop in range(len(pieces) + 1) if stops is None else stops:
        again = pieces
        for known_pieces in (stop, stop + 1):
            known = {piece.name: piece.state for piece in again[:known_pieces]}
            again = list(source.pieces(known.get))
            assert [(piece.name, piece.stamp, piece.size_bytes) for piece in again] == facts
            assert [documents_of(piece) for piece in again[known_pieces:]] == texts[known_pieces:]
