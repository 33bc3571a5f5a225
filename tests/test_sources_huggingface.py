"""Hugging Face datasets: from a disk, from a folder of data files, read whole and as a stream."""

from __future__ import annotations

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from datasets import Dataset, DatasetDict, Features, Value, config, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from read_sources import assert_goes_on_anywhere, documents_of, pieces_of, read, read_in_processes

from dsllm.data.sources.catalogue import documents, open_source
from dsllm.data.sources.piece import OpenSource
from dsllm.errors import DataError, DsllmError
from dsllm.spec.sections import HuggingFaceSource

disable_progress_bars()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The library reads its environment once, when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def source(name: Path | str, *, streaming: bool = False, **fields: str) -> HuggingFaceSource:
    return HuggingFaceSource(kind="huggingface", name=str(name), streaming=streaming, **fields)


def opened(name: Path | str, piece_bytes: int | None = None, *, streaming: bool = False, **fields: str) -> OpenSource:
    return open_source(source(name, streaming=streaming, **fields), piece_bytes=piece_bytes)


def random_texts(number: int, seed: int = 0) -> list[str]:
    return [random.Random(seed + row).randbytes(50).hex() for row in range(number)]


def write_data_files(folder: Path, texts: list[str], files: int = 3) -> Path:
    """JSON lines and Parquet, as a dataset on the Hub has them."""
    folder.mkdir(parents=True)
    for number in range(files):
        with (folder / f"train-{number}.jsonl").open("w") as file:
            for text in texts[number::files]:
                file.write(json.dumps({"id": 7, "text": text}) + "\n")
    return folder


rows = st.lists(st.one_of(st.none(), st.text(st.sampled_from("ab\n ü🙂"), max_size=30)), min_size=1, max_size=80)


@settings(deadline=None, max_examples=25)
@given(rows, st.integers(1, 3), st.integers(1, 300), st.booleans())
def test_the_pieces_of_a_saved_dataset_hold_every_row_once(
    texts: list[str | None], num_shards: int, piece_bytes: int, streaming: bool
) -> None:
    with TemporaryDirectory() as folder:
        rows = Dataset.from_dict(
            {"text": texts, "id": range(len(texts))}, Features(text=Value("string"), id=Value("int8"))
        )
        rows.save_to_disk(Path(folder) / "rows", num_shards=min(num_shards, len(texts)))
        found = opened(Path(folder) / "rows", piece_bytes, streaming=streaming)
        assert read(found) == [(f"huggingface:rows::train:{row}", text or "") for row, text in enumerate(texts)]
        assert_goes_on_anywhere(found, [0, 1, 2])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_data_files_gives_its_rows_in_other_processes(tmp_path: Path, streaming: bool) -> None:
    texts = random_texts(1000)
    write_data_files(tmp_path / "files", texts)
    found = opened(tmp_path / "files", 5000, streaming=streaming)
    assert len(pieces_of(found)) > 15
    assert [text for _, text in read_in_processes(found)] == texts[0::3] + texts[1::3] + texts[2::3]


def test_a_stream_goes_on_behind_what_is_known_without_reading_it(tmp_path: Path) -> None:
    write_data_files(tmp_path / "files", random_texts(1000))
    pieces = pieces_of(opened(tmp_path / "files", 5000, streaming=True))
    assert_goes_on_anywhere(opened(tmp_path / "files", 5000, streaming=True), [0, 1, 7, len(pieces) - 1, len(pieces)])
    known = json.loads(json.dumps({piece.name: piece.state for piece in pieces[:7]}))
    again = list(opened(tmp_path / "files", 5000, streaming=True).pieces(known.get))
    assert all(piece.texts is None for piece in again[:7])
    assert [documents_of(piece) for piece in again[7:]] == [documents_of(piece) for piece in pieces[7:]]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_data_under_the_same_name_is_read_afresh(tmp_path: Path, streaming: bool) -> None:
    folder = write_data_files(tmp_path / "files", random_texts(100))
    before = pieces_of(opened(folder, 5000, streaming=streaming))
    with (folder / "train-0.jsonl").open("a") as file:
        file.write(json.dumps({"id": 7, "text": "another"}) + "\n")
    known = {piece.name: piece.state for piece in before}
    after = list(opened(folder, 5000, streaming=streaming).pieces(known.get))
    assert not {piece.stamp for piece in before} & {piece.stamp for piece in after}
    assert "another" in [document.text for piece in after for document in documents_of(piece)]


@pytest.mark.parametrize("streaming", [False, True])
def test_pieces_of_another_size_have_other_stamps_and_are_not_recalled(tmp_path: Path, streaming: bool) -> None:
    texts = random_texts(1000)
    Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "rows")
    before = pieces_of(opened(tmp_path / "rows", 5000, streaming=streaming))
    known = {piece.name: piece.state for piece in before}
    again = list(opened(tmp_path / "rows", 9000, streaming=streaming).pieces(known.get))
    assert {piece.name for piece in before} & {piece.name for piece in again}
    assert not {(piece.name, piece.stamp) for piece in before} & {(piece.name, piece.stamp) for piece in again}
    assert [document.text for piece in again for document in documents_of(piece)] == texts


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_a_script_is_one_line(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("import datasets\n")
    with pytest.raises(DataError, match=r"cannot be loaded \(.*scripts are no longer supported.*\); correct") as caught:
        opened(tmp_path / "scripted", streaming=streaming)
    assert "\n" not in str(caught.value)


def test_a_stream_whose_first_row_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    folder = write_data_files(tmp_path / "files", ["one"], files=1)
    (folder / "train-0.jsonl").write_text("{no JSON\n")
    with pytest.raises(DataError, match=r"cannot be loaded \(.*\); correct its name") as caught:
        opened(folder, streaming=True)
    assert "\n" not in str(caught.value)


def test_rows_of_very_unlike_lengths_make_pieces_of_like_size(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["x"] * 5000 + ["y" * 5000] * 10}).save_to_disk(tmp_path / "rows")
    pieces = pieces_of(opened(tmp_path / "rows", 5000))
    assert [len(documents_of(piece)) for piece in pieces] == [5000] + [1] * 10


def test_a_dataset_of_several_splits_gives_the_one_asked_for(tmp_path: Path) -> None:
    splits = DatasetDict(train=Dataset.from_dict({"text": ["one"]}), extra=Dataset.from_dict({"text": ["two"]}))
    splits.save_to_disk(tmp_path / "splits")
    assert [document.text for document in documents(source(tmp_path / "splits", split="extra"))] == ["two"]
    with pytest.raises(DataError, match="no split 'missing'; set split to one of train, extra"):
        open_source(source(tmp_path / "splits", split="missing"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"split": "missing"}, r"\(.*missing.*\['train'\].*\)"),
        ({"subset": "missing"}, r"\(.*'missing' not found. Available: \['default'\]\)"),
    ],
)
def test_a_split_or_subset_that_is_not_there_is_one_line(
    tmp_path: Path, streaming: bool, fields: dict[str, str], reason: str
) -> None:
    write_data_files(tmp_path / "files", ["one"], files=1)
    with pytest.raises(DataError, match=f"cannot be loaded {reason}; correct its name, subset, split or") as caught:
        opened(tmp_path / "files", streaming=streaming, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_names_those_that_exist(tmp_path: Path, streaming: bool) -> None:
    Dataset.from_dict({"body": ["one"], "id": [1]}).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match="no column 'text'; set text_column to one of body, id"):
        opened(tmp_path / "rows", streaming=streaming)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jsonl").write_text('{"body": "one", "id": 1}\n')
    with pytest.raises(DataError, match="no column 'text'; set text_column to one of body, id"):
        opened(tmp_path / "files", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_is_not_text_is_an_error(tmp_path: Path, streaming: bool) -> None:
    Dataset.from_dict({"id": [1], "tags": [["a"]]}).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match="column 'id' holds int64; set text_column to a column of text"):
        opened(tmp_path / "rows", streaming=streaming, text_column="id")
    with pytest.raises(DataError, match=r"column 'tags' holds .*; set text_column to a column of text"):
        opened(tmp_path / "rows", streaming=streaming, text_column="tags")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_name_without_network_says_so_and_points_to_a_local_copy(streaming: bool) -> None:
    with pytest.raises(
        DataError,
        match=r"huggingface source 'nobody/no-such-dataset': the Hugging Face Hub cannot be reached \(.*\); mend the "
        r"network, or set name to a local copy: a folder that datasets' save_to_disk wrote, or one of Parquet files",
    ) as caught:
        opened("nobody/no-such-dataset", streaming=streaming)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_nothing_is_one_line(tmp_path: Path, streaming: bool) -> None:
    with pytest.raises(
        DataError, match=r"cannot be loaded \(.* doesn't contain any data files\); correct its name"
    ) as caught:
        opened(tmp_path, streaming=streaming)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_without_rows_has_no_text(tmp_path: Path, streaming: bool) -> None:
    Dataset.from_dict({"text": []}, Features(text=Value("string"))).save_to_disk(tmp_path / "rows")
    with pytest.raises(DataError, match=r"huggingface source '.*rows': there is no text in it; point it to files"):
        list(documents(source(tmp_path / "rows", streaming=streaming)))


def test_a_stream_that_breaks_off_says_that_what_is_prepared_is_kept(tmp_path: Path) -> None:
    folder = write_data_files(tmp_path / "files", random_texts(100))
    (folder / "train-2.jsonl").write_text("{no JSON\n")
    with pytest.raises(DsllmError, match=r"reading broke off \(.*\); what is prepared is kept: the same") as caught:
        read(opened(folder, 500, streaming=True))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_data_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    folder = write_data_files(tmp_path / "files", random_texts(100))
    (folder / "train-2.jsonl").write_text("{no JSON\n")
    with pytest.raises(
        DataError, match=r"cannot be loaded \(.*\); correct its name, subset, split or revision"
    ) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)
