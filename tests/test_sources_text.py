"""Text files: whole, in parts and between separators, plain and compressed."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from read_sources import assert_goes_on_anywhere, documents_of, pieces_of, read, read_in_processes

from dsllm.data.sources import separators
from dsllm.data.sources.catalogue import documents, kept_documents, open_source
from dsllm.data.sources.piece import OpenSource
from dsllm.data.sources.separators import stretches
from dsllm.errors import DataError
from dsllm.spec.sections import TextSource

SUFFIXES = ("", ".gz", ".zst")


def write(path: Path, content: bytes) -> Path:
    """A file, packed as its name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content, 1)
    elif path.suffix == ".zst":
        content = pa.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)
    return path


def opened(path: Path | str, piece_bytes: int | None = None, separator: str | None = None) -> OpenSource:
    return open_source(TextSource(kind="text", path=str(path), separator=separator), piece_bytes=piece_bytes)


texts = st.text(st.sampled_from("ab \n\r\tü€🙂"), max_size=60)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(texts, st.sampled_from(SUFFIXES)), min_size=1, max_size=8), st.integers(1, 50))
def test_the_pieces_of_a_folder_hold_every_file_once(files: list[tuple[str, str]], piece_bytes: int) -> None:
    with TemporaryDirectory() as folder:
        expected = []
        for number, (content, suffix) in enumerate(files):
            write(Path(folder) / f"{number}.txt{suffix}", content.encode())
            expected.append((f"text:{number}.txt{suffix}", content))
        source = opened(folder, piece_bytes)
        assert read(source) == expected
        assert_goes_on_anywhere(source)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.one_of(texts, st.sampled_from(["--", "--\n", "--\r\n", "\n--\n", "a--\n", "-", "\n"])), max_size=20),
    st.sampled_from(SUFFIXES),
    st.integers(1, 40),
)
def test_a_separator_line_stands_between_documents(stretches: list[str], suffix: str, piece_bytes: int) -> None:
    content = "".join(stretches).encode()
    expected, start, document, at = [], 0, b"", 0
    for line in content.split(b"\n"):
        line_and_newline = content[at : at + len(line) + 1]
        at += len(line_and_newline)
        if line.removesuffix(b"\r") == b"--":
            expected.append((start, document))
            start, document = at, b""
        else:
            document += line_and_newline
    expected.append((start, document))
    with TemporaryDirectory() as folder:
        file = write(Path(folder) / f"a.txt{suffix}", content)
        source = opened(file, piece_bytes, separator="--")
        found = [(f"text:{file.name}:{start}", text.decode()) for start, text in expected if text]
        assert read(source) == found
        assert_goes_on_anywhere(source)


@pytest.mark.parametrize("block_bytes", [1, 2**20])
@given(
    st.lists(st.sampled_from([b"ab", b"\n", b"\r", b"-", b"--", b"\n--\n", b"\n--\r\n", b"\n----- "]), max_size=30),
    st.sampled_from([b"--", None]),
    st.integers(1, 20),
    st.lists(st.integers(0, 120), max_size=10),
)
@example([b"a" * 30, b"\n----- a heading\n", b"b" * 30], b"--", 8, [33])
@example([b"a" * 30, b"\n--\r\n", b"b" * 30], b"--", 8, [33])
@example([b"a" * 30, b"\n--\r\n", b"b" * 30], b"--", 8, [34])
@example([b"a" * 30, b"\n--\r and more\n", b"b" * 30], b"--", 8, [34])
def test_how_a_text_arrives_in_blocks_changes_nothing(
    block_bytes: int, texts: list[bytes], separator: bytes | None, stretch_bytes: int, places: list[int]
) -> None:
    content = b"".join(texts)
    cuts = sorted(place for place in places if place < len(content))
    blocks = [content[start:stop] for start, stop in pairwise([0, *cuts, len(content)])]
    found = list(stretches([content], separator, stretch_bytes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(separators, "_BLOCK_BYTES", block_bytes)
        assert list(stretches(blocks, separator, stretch_bytes)) == found
    assert all(0 <= stretch.stop - stretch.start <= stretch_bytes for stretch in found)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("line", "num_documents"), [(b"\n----- a heading\n", 1), (b"\n---\r\n", 2), (b"\n---\n", 2)])
def test_a_line_is_told_from_a_separator_wherever_the_file_is_read(
    tmp_path: Path, suffix: str, line: bytes, num_documents: int
) -> None:
    for behind in range(len(line)):  # bytes of the line in the first block of a mebibyte
        content = b"a" * (2**20 - behind) + line + b"b" * 100
        found = read(opened(write(tmp_path / f"a.txt{suffix}", content), 1000, separator="---"))
        expected = content.split(line) if num_documents == 2 else [content]
        assert [len(text) for _, text in found] == [
            len(document) + (num_documents == 2 and not place) for place, document in enumerate(expected)
        ]


def test_white_space_and_newlines_are_kept_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ttwo  \n\n")
    assert read(opened(tmp_path / "a.txt")) == [("text:a.txt", "one\r\n\ttwo  \n\n")]


def test_small_files_share_a_piece(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x" * 30)
    assert [len(documents_of(piece)) for piece in pieces_of(opened(tmp_path, 100))] == [3, 3, 3, 1]
    assert len(pieces_of(opened(tmp_path))) == 1


def test_a_long_file_is_cut_before_newlines_behind_words(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("line of words\n\n" * 1000)
    parts = [documents_of(piece) for piece in pieces_of(opened(tmp_path, 1000))]
    assert len(parts) == 16
    assert all(part.text.startswith("\n") for (part,) in parts[1:])
    assert all(part.text.endswith("words") and len(part.text) <= 1000 for (part,) in parts[:-1])


def test_a_long_line_is_cut_between_characters(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("€" * 1000)
    parts = [documents_of(piece)[0] for piece in pieces_of(opened(tmp_path, 100))]
    assert [len(part.text) for part in parts] == [33] * 30 + [10]
    assert [part.begins for part in parts] == [True] + [False] * 30
    assert [part.ends for part in parts] == [False] * 30 + [True]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pieces_are_read_by_other_processes(tmp_path: Path, suffix: str) -> None:
    content = "".join(f"line {random.Random(number).random()}\n" for number in range(1000))
    write(tmp_path / f"a.txt{suffix}", content.encode())
    assert read_in_processes(opened(tmp_path, 1000)) == [(f"text:a.txt{suffix}", content)]


def test_the_documents_of_a_file_are_told_apart_by_where_they_begin(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\r\n<|endoftext|>\nthree <|endoftext|>\n")
    assert read(opened(tmp_path, separator="<|endoftext|>")) == [
        ("text:a.txt:0", "one\n"),
        ("text:a.txt:18", "two\r\n"),
        ("text:a.txt:37", "three <|endoftext|>\n"),
    ]


def test_a_changed_file_changes_the_stamp_of_its_piece_alone(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("x" * 90)
    before = [piece.stamp for piece in pieces_of(opened(tmp_path, 100))]
    (tmp_path / "3.txt").write_text("y" * 91)
    after = [piece.stamp for piece in pieces_of(opened(tmp_path, 100))]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pieces_of_another_size_are_not_recalled(tmp_path: Path, suffix: str) -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    write(tmp_path / f"a.txt{suffix}", text.encode())
    before = pieces_of(opened(tmp_path, 1000))
    known = {piece.name: piece.state for piece in before[:3]}
    again = list(opened(tmp_path, 700).pieces(known.get))
    assert not {piece.stamp for piece in before} & {piece.stamp for piece in again}
    assert "".join(document.text for piece in again for document in documents_of(piece)) == text


def test_pieces_of_files_that_changed_are_not_recalled(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"{number}.txt.gz", b"x" * 90)
    pieces = pieces_of(opened(tmp_path, 100))
    known = {piece.name: piece.state for piece in pieces}
    write(tmp_path / "15.txt.gz", b"new" * 30)
    again = list(opened(tmp_path, 100).pieces(known.get))
    assert [document.text[:3] for piece in again[1:] for document in documents_of(piece)] == [
        "xxx",
        "new",
        "xxx",
        "xxx",
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("separator", [None, "--"])
def test_what_becomes_of_a_long_document_is_told_by_all_of_it(
    tmp_path: Path, suffix: str, separator: str | None
) -> None:
    blank, words = " \u3000\n" * 1000, "ü and words\n" + " " * 2000 + "ü\n"
    for name, text in (("blank", blank), ("words", words)):
        write(tmp_path / f"{name}.txt{suffix}", text.encode())
    pieces = pieces_of(opened(tmp_path, 100, separator))
    assert len(pieces) > 40
    for min_characters, expected in ((len(words), {"empty": 1}), (len(words) + 1, {"empty": 1, "too short": 1})):
        dropped: Counter[str] = Counter()
        kept = [document.text for piece in pieces for document in kept_documents(piece, min_characters, dropped)]
        assert dropped == expected
        assert "".join(kept) == (words if len(expected) == 1 else "")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_invalid_utf8_names_the_file_and_the_byte(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"latin.txt{suffix}", b"x" * 5000 + b"caf\xe9 au lait" + b"y" * 5000)
    with pytest.raises(DataError, match=rf"latin\.txt{suffix}: byte 5003 is not valid UTF-8 .* convert it to UTF-8"):
        read(opened(tmp_path, 1000))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_file_names_itself(tmp_path: Path, suffix: str, kept: float) -> None:
    file = write(tmp_path / f"a.txt{suffix}", random.Random(0).randbytes(100_000).hex().encode())
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    with pytest.raises(DataError, match=rf"a\.txt{suffix}: ends in the middle of its compressed data; fetch it again"):
        list(documents(TextSource(kind="text", path=str(tmp_path))))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_packed_as_its_name_says_is_an_error(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.txt{suffix}").write_text("plain text that was never packed")
    with pytest.raises(
        DataError, match=rf"a\.txt{suffix}: cannot be unpacked \(.*\); fetch it again, or name it after"
    ):
        list(documents(TextSource(kind="text", path=str(tmp_path))))


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    (piece,) = pieces_of(opened(tmp_path))
    (tmp_path / "a.txt").write_text("x" * 50)
    with pytest.raises(DataError, match=r"a\.txt: became shorter while it was read"):
        documents_of(piece)
