"""Joining pieces: every token once, in order, in its split, whatever happens on the way."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllm.data.held_out import are_held_out
from dsllm.data.preparation import join
from dsllm.data.preparation.duplicates import Copies
from dsllm.data.preparation.join import Joiner, Routing
from dsllm.data.preparation.piece_store import BadPieceError, EncodedPiece, PieceFile, load_piece, save_piece
from dsllm.data.shards import SourceRecord
from dsllm.data.sources.piece import text_key

HALF = 2**63
END = 0


def routing(**changes: object) -> Routing:
    settled = {
        "labels": ("news", "code"),
        "validated_labels": frozenset({"code"}),
        "threshold": HALF,
        "vocab_size": 1000,
        "shard_tokens": 16,
    }
    return Routing(**{**settled, **changes})  # type: ignore[arg-type]


def piece_of(documents: list[tuple[str, bool, bool]], name: str = "piece") -> EncodedPiece:
    """A piece whose documents, (text, begins, ends), have a token for each character and one for their end."""
    tokens = [[*(ord(letter) for letter in text), *([END] if ends else [])] for text, _, ends in documents]
    starts = np.cumsum([0, *map(len, tokens)])[:-1] if tokens else np.empty(0)
    keys = b"".join(text_key(text.split("/")[0].encode()) for text, _, _ in documents)
    return EncodedPiece(
        name=name,
        tokens=np.array([token for ids in tokens for token in ids], np.uint16),
        starts=starts.astype(np.int64),
        begins=np.array([begins for _, begins, _ in documents], np.bool_),
        keys=np.frombuffer(keys, np.uint8).reshape(-1, 16),
        text_bytes=np.array([len(text) for text, _, _ in documents], np.int64),
        dropped={"empty": 1} if len(documents) % 3 == 0 else {},
        state=None,
    )


def stored(folder: Path, pieces: dict[str, list[EncodedPiece]]) -> list[PieceFile]:
    files = []
    for label, each in pieces.items():
        for index, piece in enumerate(each):
            file = PieceFile(folder / "pieces", label, index, f"piece {index}", "stamp")
            save_piece(file.path, piece)
            files.append(file)
    return files


def stream(folder: Path, source: SourceRecord, split: str) -> list[str]:
    """The documents of a stream, spelled out."""
    shards = source.streams[split].shards if split in source.streams else ()  # type: ignore[index]
    tokens = np.concatenate([np.fromfile(folder / shard.file, "<u2") for shard in shards] or [np.empty(0)])
    text = "".join(map(chr, tokens.astype(int)))
    assert text == "" or text.endswith(chr(END))
    return text.split(chr(END))[:-1]


words = st.text("abcdefg", min_size=1, max_size=30)
corpora = st.lists(st.lists(words, max_size=5), max_size=8)


@given(corpora, corpora, st.lists(st.integers(0, 15), max_size=4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_document_reaches_its_split_once_however_often_joining_is_killed(
    news: list[list[str]], code: list[list[str]], kills: list[int], drops_copies: bool
) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "_PIECES_BETWEEN_NOTES", 2)
        folder = Path(name)
        encoded = {
            label: [piece_of([(text, True, True) for text in texts]) for texts in pieces]
            for label, pieces in {"news": news, "code": code}.items()
        }
        files = stored(folder, encoded)
        copies = Copies([file.path for file in files], folder / "copies") if drops_copies else None
        leaked = []
        for kill in kills:
            joiner = Joiner(folder, routing())
            leaked.append(joiner)  # what it has not written yet must not reach the disk later: as if it were killed
            for index in range(len(joiner.joined), min(kill, len(files))):
                joiner.add(files[index], copies.of(index) if copies else None, keep=drops_copies)
        with Joiner(folder, routing()) as joiner:
            for index in range(len(joiner.joined), len(files)):
                joiner.add(files[index], copies.of(index) if copies else None, keep=drops_copies)
            news_record, code_record = joiner.finish(["the news", "the code"])
        in_order = [text for pieces in (news, code) for texts in pieces for text in texts]
        first = [text for index, text in enumerate(in_order) if text not in in_order[:index]]
        kept = first if drops_copies else in_order
        all_news, all_code = [[text for texts in pieces for text in texts] for pieces in (news, code)]
        if drops_copies:
            all_news = [text for text in kept if text in all_news]
            all_code = [text for text in kept if text not in all_news]
        held_out = [text for text in all_news if int.from_bytes(text_key(text.encode())[:8], "little") < HALF]
        assert stream(folder, news_record, "validation") == held_out
        assert stream(folder, news_record, "train") == [text for text in all_news if text not in held_out]
        assert stream(folder, code_record, "validation") == all_code
        assert "train" not in code_record.streams
        assert news_record.documents + code_record.documents == len(kept)
        assert news_record.text_bytes == sum(map(len, all_news))
        assert news_record.dropped.get("empty", 0) == sum(len(texts) % 3 == 0 for texts in news)
        duplicates = sum(record.dropped.get("duplicate", 0) for record in (news_record, code_record))
        assert duplicates == len(in_order) - len(kept)
        for record in leaked:
            record.__exit__()


def test_a_document_in_several_pieces_stays_whole_or_is_left_out_whole(tmp_path: Path) -> None:
    long = [("long/1", True, False), ("long/2", False, False)], [("long/3", False, True), ("short", True, True)]
    again = [("long/1", True, False)], [("long/2", False, True), ("other", True, True)]
    files = stored(tmp_path, {"news": [piece_of(documents) for documents in (*long, *again)]})
    copies = Copies([file.path for file in files], tmp_path / "copies")
    with Joiner(tmp_path, routing(threshold=0)) as joiner:
        for index, file in enumerate(files):
            joiner.add(file, copies.of(index), keep=True)
        record, _ = joiner.finish(["", ""])
    assert stream(tmp_path, record, "train") == ["long/1long/2long/3", "short", "other"]
    assert (record.documents, record.dropped) == (3, {"duplicate": 1})


def test_joined_pieces_are_deleted_once_they_are_noted_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "_PIECES_BETWEEN_NOTES", 2)
    files = stored(tmp_path, {"news": [piece_of([("a", True, True)]) for _ in range(5)]})
    with Joiner(tmp_path, routing()) as joiner:
        for file in files:
            joiner.add(file)
        assert [file.path.exists() for file in files] == [False, False, False, False, True]


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"", lambda content: content[:-1]])
def test_a_damaged_piece_is_found(tmp_path: Path, damage: object) -> None:
    (file,) = stored(tmp_path, {"news": [piece_of([("a" * 500, True, True)])]})
    file.path.write_bytes(damage(file.path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(BadPieceError, match=file.path.name):
        load_piece(file.path)


def test_a_flipped_bit_in_a_piece_is_found(tmp_path: Path) -> None:
    (file,) = stored(tmp_path, {"news": [piece_of([("a" * 500, True, True)])]})
    content = bytearray(file.path.read_bytes())
    content[content.index(b"a\0a\0a\0") + 10] ^= 1
    file.path.write_bytes(content)
    with pytest.raises(BadPieceError):
        load_piece(file.path)


def test_half_the_keys_lie_below_half_of_all_numbers() -> None:
    keys = np.frombuffer(b"".join(text_key(str(number).encode()) for number in range(10_000)), np.uint8)
    share = are_held_out(keys.reshape(-1, 16), HALF).mean()
    assert 0.48 < share < 0.52
