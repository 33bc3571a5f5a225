"""Preparation: the same bytes however it is done, a clean split, and a folder that is complete or untouched."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from small_text import text_spec, write_corpus

from dsllm.data import encode
from dsllm.data.prepare import Progress, default_directory, identity_hash, prepare, validation_threshold
from dsllm.data.shards import Split, TokenShards
from dsllm.data.sources import Document
from dsllm.data.tokenizer import load_tokenizer
from dsllm.errors import DataError, DsllmError, UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents_of(folder: Path, split: Split) -> list[str]:
    """The split's documents, decoded from its tokens."""
    shards = TokenShards.open(folder, split)
    tokenizer = load_tokenizer(folder / "tokenizer")
    starts = shards.document_starts()
    pieces = np.split(shards.read(0, len(shards)), starts[1:])
    assert all(piece[-1] == tokenizer.eos_token_id for piece in pieces)
    return [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]


def texts_of(corpus: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]


def test_every_document_is_in_exactly_one_split_and_decodes_to_itself(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(text_spec(corpus), tmp_path / "data", processes=1)
    train, validation = (documents_of(tmp_path / "data", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts_of(corpus))
    assert 1 <= len(validation) < len(train)
    assert manifest.documents == len(train) + len(validation) == manifest.sources[0].documents == 40
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts_of(corpus))
    assert manifest.tokens == sum(split.tokens for split in manifest.splits.values())


def test_validation_documents_are_never_in_training(corpus: Path, tmp_path: Path) -> None:
    prepare(text_spec(corpus, "data.validation_fraction=0.5"), tmp_path / "data", processes=1)
    train, validation = (set(documents_of(tmp_path / "data", split)) for split in ("train", "validation"))
    assert len(validation) > 10
    assert not train & validation


def test_a_document_stays_on_its_side_when_others_come(corpus: Path, tmp_path: Path) -> None:
    few = write_corpus(tmp_path / "few", documents=30)
    sides = []
    for name, folder in (("few", few), ("all", corpus)):
        prepare(text_spec(folder, "data.validation_fraction=0.3"), tmp_path / f"data-{name}", processes=1)
        sides.append(set(documents_of(tmp_path / f"data-{name}", "validation")))
    assert sides[0] <= sides[1]


def test_one_and_three_processes_write_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 500)  # a batch for each document: enough for processes to start
    spec = text_spec(corpus, "data.shard_tokens=2000")
    for processes in (1, 3):
        prepare(spec, tmp_path / f"by-{processes}", processes=processes)
    written = contents(tmp_path / "by-1")
    assert {"manifest.json", "train-00001.bin", "train-00001.idx", "tokenizer/tokenizer.json"} <= set(written)
    assert written == contents(tmp_path / "by-3")


def test_a_text_that_spells_end_of_text_ends_no_document(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "forged.txt").write_text("one document<|endoftext|>and still the same")
    prepare(text_spec(corpus), tmp_path / "data", processes=1)
    splits = [TokenShards.open(tmp_path / "data", split) for split in ("train", "validation")]
    assert sum(int((split.read(0, len(split)) == 1).sum()) for split in splits) == 41


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_small_source_leaves_neither_split_empty(tmp_path: Path, fraction: float) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=3, words=1200)
    manifest = prepare(text_spec(corpus, f"data.validation_fraction={fraction}"), tmp_path / "data", processes=1)
    counts = {name: split.documents for name, split in manifest.splits.items()}
    assert sorted(counts.values()) == [1, 2]


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("the only one")
    with pytest.raises(DataError, match=r"data.sources: given 1 document; .* split the text into several files"):
        prepare(text_spec(tmp_path / "only.txt"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_threshold_is_the_fraction_where_there_is_text_enough(corpus: Path) -> None:
    assert validation_threshold(text_spec(corpus, "data.validation_fraction=0.25").data) == 2**62


def test_identity_hashes_are_the_same_on_every_machine() -> None:
    assert identity_hash("python-stdlib:json/decoder.py") == 9987917460463097013


def test_prepared_data_is_reused(corpus: Path, tmp_path: Path) -> None:
    first = prepare(text_spec(corpus), tmp_path / "data", processes=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    elsewhere = text_spec(corpus, f"data.directory={tmp_path / 'data'}", name="another-name")
    assert prepare(elsewhere, tmp_path / "data") == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}


def test_data_of_another_spec_is_refused(corpus: Path, tmp_path: Path) -> None:
    prepare(text_spec(corpus), tmp_path / "data", processes=1)
    other = text_spec(corpus, "tokenizer.vocab_size=450", "data.validation_fraction=0.2")
    with pytest.raises(
        UserError, match=r"other values of tokenizer.vocab_size, data.validation_fraction; set data.dir"
    ):
        prepare(other, tmp_path / "data")


def test_a_folder_with_other_files_is_refused_and_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        UserError, match=r"holds .*, which dsllm did not prepare; set data.directory to an empty folder"
    ):
        prepare(text_spec(corpus), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_unequal_weights_are_refused(corpus: Path, tmp_path: Path) -> None:
    sources = f"data.sources=[{{kind: text, path: '{corpus}'}}, {{kind: python-stdlib, weight: 2}}]"
    with pytest.raises(UserError, match=r"given the weights 1, 2; .* give all sources the same weight"):
        prepare(text_spec(corpus, sources), tmp_path / "data")


def test_several_sources_are_counted_each(corpus: Path, tmp_path: Path) -> None:
    one = corpus / "document-000.txt"
    sources = f"data.sources=[{{kind: text, path: '{corpus}'}}, {{kind: text, path: '{one}'}}]"
    manifest = prepare(text_spec(corpus, sources), tmp_path / "data", processes=1)
    assert [source.documents for source in manifest.sources] == [40, 1]
    assert [source.source for source in manifest.sources] == [f"text source '{corpus}'", f"text source '{one}'"]


def test_an_interrupted_preparation_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(text_spec(corpus), tmp_path / "data", processes=1, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_preparation_left_is_replaced(corpus: Path, tmp_path: Path) -> None:
    prepare(text_spec(corpus), tmp_path / "clean", processes=1)
    killed = tmp_path / "killed"
    (killed / ".partial" / "tokenizer").mkdir(parents=True)
    (killed / ".partial" / "train-00000.bin").write_bytes(b"half")
    (killed / "tokenizer").mkdir()
    (killed / "tokenizer" / "tokenizer.json").write_text("moved up before the kill")
    prepare(text_spec(corpus), killed, processes=1)
    assert contents(killed) == contents(tmp_path / "clean")


def test_a_full_disk_is_one_line_and_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    with (
        largest_file(bytes_allowed=4096),
        pytest.raises(DsllmError, match=r"preparing failed \(.*\); nothing was kept"),
    ):
        prepare(text_spec(corpus), tmp_path / "data", processes=1)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def largest_file(bytes_allowed: int) -> Iterator[None]:
    """Writes beyond this size fail in this process, as they do on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Deadly(Document):
    """A document that ends the process that receives it."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (1,)


def test_a_worker_that_dies_is_one_line(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(text_spec(corpus), tmp_path / "data", processes=1)
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 1)
    documents = [Deadly(str(index), "text") for index in range(40)]
    tokenizer_file = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    with (
        pytest.raises(DsllmError, match="a tokenizing process died, most likely for lack of memory; try --processes"),
        encode.encoder(tokenizer_file, 1, processes=2) as encode_documents,
    ):
        list(encode_documents(documents))


def test_progress_counts_up_to_the_whole(corpus: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    manifest = prepare(text_spec(corpus), tmp_path / "data", processes=1, on_progress=seen.append)
    assert seen[0] == Progress()
    assert seen[-1] == Progress(manifest.documents, manifest.text_bytes, manifest.tokens)


def test_the_default_folder_follows_the_name_unless_it_is_given() -> None:
    assert default_directory(text_spec("anything")) == Path("data/small")
    assert default_directory(text_spec("anything", "data.directory=elsewhere")) == Path("elsewhere")
