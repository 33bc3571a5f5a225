"""Deep Lake: a real dataset on this disk."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import pytest
from read_sources import assert_goes_on_anywhere, documents_of, pieces_of, read, read_in_processes

from dsllm.data.sources.catalogue import documents, open_source
from dsllm.data.sources.piece import OpenSource
from dsllm.errors import DataError, DsllmError
from dsllm.spec.sections import DeepLakeSource


def source(path: Path | str, text_column: str = "text") -> DeepLakeSource:
    return DeepLakeSource(kind="deeplake", path=str(path), text_column=text_column)


def opened(path: Path | str, piece_bytes: int | None = None) -> OpenSource:
    return open_source(source(path), piece_bytes=piece_bytes)


def write(path: Path, texts: list[str]) -> Path:
    deeplake = pytest.importorskip("deeplake", reason="deeplake has no release for this machine")
    types = deeplake.types
    schema = {"text": types.Text(), "id": types.Int32(), "tags": types.Sequence(types.Text())}
    dataset = deeplake.create(str(path), schema=schema)
    if texts:
        dataset.append({"text": texts, "id": list(range(len(texts))), "tags": [["a"]] * len(texts)})
    dataset.commit()
    return path


@pytest.mark.parametrize("piece_bytes", [1, 500, 5000, 10**6])
def test_the_pieces_of_a_dataset_hold_every_row_once(tmp_path: Path, piece_bytes: int) -> None:
    texts = [f"{row} ü🙂\n" * (row % 7) for row in range(300)]
    found = opened(write(tmp_path / "rows", texts), piece_bytes)
    assert read(found) == [(f"deeplake:rows:{row}", text) for row, text in enumerate(texts)]
    assert_goes_on_anywhere(found, [0, 1, 2])


def test_pieces_are_read_by_other_processes(tmp_path: Path) -> None:
    texts = [random.Random(row).randbytes(50).hex() for row in range(1000)]
    found = opened(write(tmp_path / "rows", texts), 5000)
    assert len(pieces_of(found)) == 20
    assert [text for _, text in read_in_processes(found)] == texts


def test_a_dataset_that_grows_changes_its_stamps(tmp_path: Path) -> None:
    import deeplake

    write(tmp_path / "rows", ["one"])
    (before,) = pieces_of(opened(tmp_path / "rows"))
    dataset = deeplake.open(str(tmp_path / "rows"))
    dataset.append({"text": ["two"], "id": [1], "tags": [["a"]]})
    dataset.commit()
    (after,) = pieces_of(opened(tmp_path / "rows"))
    assert before.stamp != after.stamp
    assert [document.text for document in documents(source(tmp_path / "rows"))] == ["one", "two"]


def test_pieces_of_another_size_have_other_stamps(tmp_path: Path) -> None:
    write(tmp_path / "rows", ["some text"] * 100)
    before, after = (pieces_of(opened(tmp_path / "rows", size)) for size in (100, 200))
    assert before[0].name == after[0].name
    assert not {(piece.name, piece.stamp) for piece in before} & {(piece.name, piece.stamp) for piece in after}


def test_a_dataset_that_is_lost_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "rows", [random.Random(row).randbytes(500).hex() for row in range(3000)])
    pieces = pieces_of(opened(tmp_path / "rows", 10**6))
    shutil.rmtree(tmp_path / "rows")
    with pytest.raises(DsllmError, match=r"'.*rows': (reading broke off|cannot be opened) \(.*\); ") as caught:
        documents_of(pieces[-1])
    assert "\n" not in str(caught.value)


def test_a_dataset_without_its_rows_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "rows", [random.Random(row).randbytes(500).hex() for row in range(3000)])
    max((file for file in (tmp_path / "rows").rglob("*")), key=lambda file: file.stat().st_size).unlink()
    with pytest.raises(DataError, match=r"'.*rows': cannot be opened \(.*\); correct the path") as caught:
        opened(tmp_path / "rows")
    assert "\n" not in str(caught.value)


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    write(tmp_path / "rows", ["one"])
    with pytest.raises(
        DataError, match=r"deeplake source '.*rows': no column 'body'; set text_column to one of id, tags"
    ):
        open_source(source(tmp_path / "rows", "body"))


@pytest.mark.parametrize(("column", "holds"), [("id", "int32"), ("tags", r"sequence\[text")])
def test_a_column_that_is_not_text_is_an_error(tmp_path: Path, column: str, holds: str) -> None:
    write(tmp_path / "rows", ["one"])
    with pytest.raises(DataError, match=f"column '{column}' holds {holds}.*; set text_column to a column of text"):
        open_source(source(tmp_path / "rows", column))


def test_a_dataset_without_rows_has_no_text(tmp_path: Path) -> None:
    write(tmp_path / "rows", [])
    with pytest.raises(DataError, match=r"deeplake source '.*rows': there is no text in it"):
        list(documents(source(tmp_path / "rows")))


def test_a_folder_that_is_no_dataset_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("deeplake", reason="deeplake has no release for this machine")
    with pytest.raises(
        DataError, match=r"deeplake source '.*': cannot be opened \(.* does not exist .*\); correct the path"
    ) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_without_deeplake_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deeplake", None)
    with pytest.raises(DataError, match=r"deeplake is not installed; pip install 'dsllm\[deeplake\]'"):
        opened(tmp_path)
