"""Parquet files: rows in pieces of their text, and files and columns that are none."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from read_sources import assert_goes_on_anywhere, documents_of, pieces_of, read, read_in_processes

from dsllm.data.sources.catalogue import documents, open_source
from dsllm.data.sources.piece import OpenSource
from dsllm.errors import DataError
from dsllm.spec.sections import ParquetSource


def source(path: Path | str, text_column: str = "text") -> ParquetSource:
    return ParquetSource(kind="parquet", path=str(path), text_column=text_column)


def opened(path: Path | str, piece_bytes: int | None = None) -> OpenSource:
    return open_source(source(path), piece_bytes=piece_bytes)


def write(
    path: Path, texts: list[str | None], row_group_size: int = 1000, type_: pa.DataType | None = None, **options: bool
) -> Path:
    table = pa.table({"id": pa.array(range(len(texts))), "text": pa.array(texts, type_ or pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size, **options)
    return path


STRING_TYPES = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]
rows = st.lists(st.one_of(st.none(), st.text(st.sampled_from("ab\n ü🙂"), max_size=30)), max_size=80)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(rows, st.integers(1, 40), st.sampled_from(STRING_TYPES)), min_size=1, max_size=3),
    st.integers(1, 300),
    st.booleans(),
)
def test_the_pieces_of_a_folder_hold_every_row_once(
    files: list[tuple[list[str | None], int, pa.DataType]], piece_bytes: int, use_dictionary: bool
) -> None:
    with TemporaryDirectory() as folder:
        expected = []
        for number, (texts, row_group_size, type_) in enumerate(files):
            write(Path(folder) / f"{number}.parquet", texts, row_group_size, type_, use_dictionary=use_dictionary)
            expected += [(f"parquet:{number}.parquet:{row}", text or "") for row, text in enumerate(texts)]
        found = opened(folder, piece_bytes)
        assert read(found) == expected
        assert_goes_on_anywhere(found, [0, 1, 3])


def random_texts(number: int) -> list[str | None]:
    return [random.Random(row).randbytes(50).hex() for row in range(number)]


@pytest.mark.parametrize("row_group_size", [10, 300, 10_000])
def test_pieces_are_read_by_other_processes(tmp_path: Path, row_group_size: int) -> None:
    texts = random_texts(1000)
    write(tmp_path / "a.parquet", texts, row_group_size)
    found = opened(tmp_path, 5000)
    assert 15 <= len(pieces_of(found)) <= 60
    assert [text for _, text in read_in_processes(found)] == texts


def test_a_huge_row_group_is_read_once_and_small_ones_by_whoever_needs_them(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", random_texts(1000), row_group_size=1000)
    for piece_bytes, is_carried in ((1000, True), (50_000, False)):
        (span, *_) = pieces_of(opened(tmp_path, piece_bytes))[0].spans
        assert (span.carried is not None) == is_carried


@pytest.mark.parametrize("row_group_size", [100, 3000, 100_000])
def test_texts_that_repeat_fill_pieces_by_what_they_unpack_to(tmp_path: Path, row_group_size: int) -> None:
    texts: list[str | None] = [letter * 1000 for letter in "abc"] * 1000
    file = write(tmp_path / "a.parquet", texts, row_group_size)
    assert file.stat().st_size < 200_000
    pieces = pieces_of(opened(tmp_path, 100_000))
    assert 30 <= len(pieces) <= 60
    assert all(sum(len(document.text) for document in documents_of(piece)) <= 100_000 for piece in pieces)
    assert [text for _, text in read(opened(tmp_path, 100_000))] == texts
    assert_goes_on_anywhere(opened(tmp_path, 100_000), [0, 1, 7])


def test_long_texts_that_repeat_behind_short_ones_are_unpacked_a_little_at_a_time(tmp_path: Path) -> None:
    texts: list[str | None] = ["a"] * 10_000 + ["long" * 250_000] * 300
    write(tmp_path / "a.parquet", texts, row_group_size=20_000)
    (piece,) = pieces_of(opened(tmp_path))
    before, most, number = pa.total_allocated_bytes(), 0, 0
    for number, document in enumerate(piece.documents(Counter()), 1):
        most = max(most, pa.total_allocated_bytes() - before)
        assert document.text == texts[number - 1]
    assert number == len(texts)
    assert most < 2**25


def test_small_files_share_a_piece(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.parquet", random_texts(10))
    (piece,) = pieces_of(opened(tmp_path))
    assert len(documents_of(piece)) == 50
    assert piece.size_bytes == opened(tmp_path).size_bytes


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["one"])
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body'; set text_column to one of id, text"):
        list(documents(source(tmp_path, "body")))


def test_a_column_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["one"])
    with pytest.raises(DataError, match=r"a\.parquet: column 'id' holds int64; set text_column to a column of text"):
        list(documents(source(tmp_path, "id")))


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_a_parquet_file_that_is_none_names_itself(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(
        DataError, match=r"a\.parquet: not a Parquet file that can be read \(.*\); fetch it again"
    ) as caught:
        list(documents(source(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_damaged_page_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", random_texts(1000))
    content = bytearray(file.read_bytes())
    column = pq.read_metadata(file).row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 200] = b"\xff" * 200
    file.write_bytes(bytes(content))
    with pytest.raises(
        DataError, match=r"a\.parquet: (a damaged Parquet file|not a Parquet file that can be read) \(.*\); "
    ):
        list(documents(source(tmp_path)))


def test_a_file_without_rows_has_no_text(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [])
    with pytest.raises(DataError, match=r"parquet source '.*': there is no text in it; point it to files"):
        list(documents(source(tmp_path)))
