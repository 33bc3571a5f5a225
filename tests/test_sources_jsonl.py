"""JSON lines: every line read once wherever pieces are cut, and bad ones named by file and number."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from read_sources import assert_goes_on_anywhere, pieces_of, read, read_in_processes

from dsllm.data.sources import jsonl
from dsllm.data.sources.catalogue import documents, open_source
from dsllm.data.sources.piece import OpenSource
from dsllm.errors import DataError
from dsllm.spec.sections import JsonlSource

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")


def source(path: Path | str, text_column: str = "text") -> JsonlSource:
    return JsonlSource(kind="jsonl", path=str(path), text_column=text_column)


def opened(path: Path | str, piece_bytes: int | None = None, *, skip_bad_lines: bool = False) -> OpenSource:
    return open_source(source(path), skip_bad_lines=skip_bad_lines, piece_bytes=piece_bytes)


def write(path: Path, content: bytes) -> Path:
    """A file, packed as its name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content, 1)
    elif path.suffix == ".zst":
        content = pa.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)
    return path


def line(text: str | None) -> str:
    return json.dumps({"id": 7, "text": text}, ensure_ascii=False)


lines = st.one_of(
    st.text(st.sampled_from('ab\n\\"ü🙂'), max_size=40).map(line), st.just(line(None)), st.sampled_from(["", " "])
)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.lists(lines, max_size=12), st.booleans(), st.sampled_from(SUFFIXES)), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(1, 120),
)
def test_the_pieces_of_a_folder_hold_every_line_once(
    files: list[tuple[list[str], bool, str]], newline: str, piece_bytes: int
) -> None:
    with TemporaryDirectory() as folder:
        expected = []
        for number, (content, ends_in_newline, suffix) in enumerate(files):
            name = f"{number}{suffix}"
            encoded = (newline.join(content) + (newline if ends_in_newline else "")).encode()
            write(Path(folder) / name, encoded)
            start = 0
            for row in content:
                if row.strip():
                    expected.append((f"jsonl:{name}:{start}", json.loads(row)["text"] or ""))
                start += len((row + newline).encode())
        found = opened(folder, piece_bytes)
        assert read(found) == expected
        assert_goes_on_anywhere(found, [0, 1, 3])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pieces_are_read_by_other_processes(tmp_path: Path, suffix: str) -> None:
    texts = [f"text {random.Random(number).random()}" for number in range(1000)]
    write(tmp_path / f"a{suffix}", "".join(line(text) + "\n" for text in texts).encode())
    found = opened(tmp_path, 5000)
    assert len(pieces_of(found)) > 5
    assert [text for _, text in read_in_processes(found)] == texts


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line("one").encode())
    assert read(opened(tmp_path)) == [("jsonl:a.jsonl:0", "one")]


def test_half_of_an_escaped_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude42 \ud83d and \udE42"}')
    assert read(opened(tmp_path)) == [("jsonl:a.jsonl:0", "🙂 \ufffd and \ufffd")]


BAD_LINES = {
    b'{"text": "cut': r"is not JSON \(Unterminated string starting at\); mend it, or leave such lines out with dsllm ",
    b'"text"': "holds a string instead of an object; mend it, or",
    b"[1]": "holds an array instead of an object; mend it, or",
    b'{"body": "a", "id": 1}': "has no 'text', but body, id; set text_column to one of them, or",
    b"{}": "has no 'text', but nothing; set text_column",
    b'{"text": 3}': "holds a number in 'text'; set text_column to a key of text, or",
    b'{"text": true}': "holds a truth value in 'text'; set text_column",
    b'{"text": {"a": 1}}': "holds an object in 'text'; set text_column",
    b'{"text": "caf\xe9"}': r"is not valid UTF-8 \(invalid continuation byte\); mend it, or",
    b"[" * 100_000: r"is not JSON that can be read \(too deep, or too long a number\); mend it, or",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: bad[:12].decode(errors="replace"))
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_a_bad_line_names_its_file_and_number(tmp_path: Path, bad: bytes, suffix: str) -> None:
    good = line("x" * 30).encode() + b"\n"
    write(tmp_path / f"a{suffix}", good * 20 + b"\n" + bad + b"\n" + good * 20)
    with pytest.raises(DataError, match=rf"a{suffix}: line 22 {BAD_LINES[bad]}") as caught:
        read(opened(tmp_path, 200))
    assert str(caught.value).endswith(", or leave such lines out with dsllm data prepare --skip-bad-lines")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bad_lines_are_counted_when_they_are_skipped(tmp_path: Path, suffix: str) -> None:
    good = line("good").encode()
    write(tmp_path / f"a{suffix}", b"\n".join([good, *BAD_LINES, good]))
    dropped: Counter[str] = Counter()
    assert [text for _, text in read(opened(tmp_path, 50, skip_bad_lines=True), dropped)] == ["good", "good"]
    assert dropped == {"bad line": len(BAD_LINES)}


def test_a_file_of_bad_lines_alone_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"every document was dropped \(2 bad line\)"):
        list(documents(source(tmp_path), skip_bad_lines=True))


def test_an_empty_file_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match=r"jsonl source '.*': there is no text in it; point it to files that hold some"):
        list(documents(source(tmp_path)))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_file_names_itself(tmp_path: Path, suffix: str, kept: float) -> None:
    content = "".join(line(random.Random(number).randbytes(40).hex()) + "\n" for number in range(1000)).encode()
    file = write(tmp_path / f"a.jsonl{suffix}", content)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    with pytest.raises(
        DataError, match=rf"a\.jsonl{suffix}: ends in the middle of its compressed data; fetch it again"
    ):
        read(opened(tmp_path, 10_000))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_without_end_is_an_error_before_it_fills_the_memory(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 2**20)
    write(tmp_path / f"a{suffix}", line("short").encode() + b"\n[" + b'{"text": "x"}, ' * 100_000)
    with pytest.raises(DataError, match=rf"a{suffix}: line 2 is longer than 1 MiB; a document is one line: write each"):
        list(documents(source(tmp_path)))


def test_known_pieces_of_compressed_files_are_not_unpacked_again(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.jsonl.gz", (line("x" * 80) + "\n").encode() * 10)
    pieces = pieces_of(opened(tmp_path, 300))
    stat = (tmp_path / "0.jsonl.gz").stat()
    (tmp_path / "0.jsonl.gz").write_bytes(b"?" * stat.st_size)  # whoever unpacks it now fails
    os.utime(tmp_path / "0.jsonl.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    known = {piece.name: piece.state for piece in pieces[:-1]}
    again = list(opened(tmp_path, 300).pieces(known.get))
    assert [piece.name for piece in again] == [piece.name for piece in pieces]
