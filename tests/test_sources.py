"""Sources: which documents they give, in which order, and what they say when they cannot."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from dsllm.data.sources import documents
from dsllm.errors import DataError
from dsllm.spec.sections import HuggingFaceSource, PythonStdlibSource, TextSource


def text(path: Path | str) -> TextSource:
    return TextSource(kind="text", path=str(path))


def huggingface(name: Path | str, **fields: str) -> HuggingFaceSource:
    return HuggingFaceSource(kind="huggingface", name=str(name), **fields)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("second")
    (folder / "a.md").write_text("first")
    (folder / "deep" / "c.py").write_text("third")
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("not text of the corpus")
    return folder


def test_the_standard_library_is_read_without_its_tests() -> None:
    found = {document.identity: document.text for document in documents(PythonStdlibSource(kind="python-stdlib"))}
    assert len(found) > 400
    folders = {folder for identity in found for folder in identity.removeprefix("python-stdlib:").split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages"}
    decoder = Path(sysconfig.get_path("stdlib")) / "json" / "decoder.py"
    assert found["python-stdlib:json/decoder.py"] == decoder.read_bytes().decode()


def test_a_folder_gives_its_text_files_in_order_of_their_paths(corpus: Path) -> None:
    assert [(document.identity, document.text) for document in documents(text(corpus))] == [
        ("text:a.md", "first"),
        ("text:b.txt", "second"),
        ("text:deep/c.py", "third"),
    ]


def test_a_file_and_a_glob_name_documents_as_the_folder_does(corpus: Path) -> None:
    assert [document.identity for document in documents(text(corpus / "b.txt"))] == ["text:b.txt"]
    assert [document.identity for document in documents(text(corpus / "**" / "*.py"))] == ["text:deep/c.py"]


def test_white_space_and_newlines_are_kept_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ttwo  \n\n")
    assert [document.text for document in documents(text(tmp_path / "a.txt"))] == ["one\r\n\ttwo  \n\n"]


def test_empty_text_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(DataError, match=r"text source '.*empty\.txt': there is no text in it; point it to files"):
        list(documents(text(tmp_path / "empty.txt")))


def test_a_folder_without_text_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no text in it"):
        list(documents(text(tmp_path)))


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"text source '.*/nowhere': no file, folder or match of that name"):
        list(documents(text(tmp_path / "nowhere")))


def test_invalid_utf8_names_the_file_and_the_byte(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt: byte 3 is not valid UTF-8 .* convert it to UTF-8"):
        list(documents(text(tmp_path)))


def test_a_dataset_on_disk_gives_its_rows(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["one", "", "two"], "id": [1, 2, 3]}).save_to_disk(tmp_path / "rows")
    found = list(documents(huggingface(tmp_path / "rows")))
    assert [(document.identity, document.text) for document in found] == [
        ("huggingface:rows::train:0", "one"),
        ("huggingface:rows::train:2", "two"),
    ]


def test_a_dataset_of_several_splits_gives_the_one_asked_for(tmp_path: Path) -> None:
    splits = DatasetDict(train=Dataset.from_dict({"text": ["one"]}), extra=Dataset.from_dict({"text": ["two"]}))
    splits.save_to_disk(tmp_path / "splits")
    assert [document.text for document in documents(huggingface(tmp_path / "splits", split="extra"))] == ["two"]
    with pytest.raises(DataError, match="no split 'missing'; set split to one of train, extra"):
        list(documents(huggingface(tmp_path / "splits", split="missing")))


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    Dataset.from_dict({"body": ["one"], "id": [1]}).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match="no column 'text'; set text_column to one of body, id"):
        list(documents(huggingface(tmp_path / "rows")))


def test_a_column_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    Dataset.from_dict({"id": [1]}).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match="row 0 of column 'id' holds int; set text_column to a column of text"):
        list(documents(huggingface(tmp_path / "rows", text_column="id")))


def test_a_hub_name_without_network_is_one_line_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"check the name and the network, or set name to a folder") as caught:
        list(documents(huggingface("nobody/no-such-dataset")))
    assert "\n" not in str(caught.value)
