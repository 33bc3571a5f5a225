"""Preparation: the same bytes however it is done, a clean split, and a folder that is complete or untouched."""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from small_text import text_spec, write_corpus

from dsllm.data.preparation import encode, join
from dsllm.data.preparation.encode import Task, encoder
from dsllm.data.preparation.pipeline import Progress
from dsllm.data.preparation.recipe import Recipe
from dsllm.data.prepare import default_directory, prepare
from dsllm.data.shards import Split, TokenShards, read_manifest
from dsllm.data.sources import text
from dsllm.data.tokenizer import load_tokenizer
from dsllm.errors import DataError, DsllmError, UserError
from dsllm.spec.sections import Spec


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece for every few documents, and a note after every second: what large corpora meet."""
    monkeypatch.setattr(text, "PIECE_BYTES", 3000)
    monkeypatch.setattr(join, "_PIECES_BETWEEN_NOTES", 2)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents_of(folder: Path, split: Split, label: str = "corpus") -> list[str]:
    """The split's documents, decoded from its tokens."""
    shards = TokenShards(folder, read_manifest(folder), label, split)
    tokenizer = load_tokenizer(folder / "tokenizer")
    pieces = np.split(shards.read(0, len(shards)), shards.document_starts()[1:])
    assert all(piece[-1] == tokenizer.eos_token_id for piece in pieces)
    return [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]


def texts_of(corpus: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]


def two_sources(one: Path, other: Path, *overrides: str) -> Spec:
    sources = f"data.sources=[{{kind: text, path: '{one}', label: one}}, {{kind: text, path: '{other}', label: other}}]"
    return text_spec(one, sources, *overrides)


# --- documents and splits ---------------------------------------------------------------------------------------------


def test_every_document_is_in_exactly_one_split_and_decodes_to_itself(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(text_spec(corpus), tmp_path / "data", processes=1)
    train, validation = (documents_of(tmp_path / "data", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(texts_of(corpus))
    assert 1 <= len(validation) < len(train)
    assert manifest.documents == len(train) + len(validation) == manifest.sources[0].documents == 40
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts_of(corpus))
    assert manifest.tokens == manifest.tokens_of("train") + manifest.tokens_of("validation")


def test_documents_keep_their_order(corpus: Path, tmp_path: Path) -> None:
    prepare(text_spec(corpus), tmp_path / "data", processes=1)
    train = documents_of(tmp_path / "data", "train")
    assert train == [text for text in texts_of(corpus) if text in train]


def test_a_copy_of_a_held_out_document_is_held_out_too(corpus: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice"
    for index, content in enumerate([*texts_of(corpus), *reversed(texts_of(corpus))]):
        (twice / f"{index:03d}.txt").parent.mkdir(exist_ok=True)
        (twice / f"{index:03d}.txt").write_text(content)
    prepare(text_spec(twice, "data.validation_fraction=0.5"), tmp_path / "data", processes=1)
    train, validation = (Counter(documents_of(tmp_path / "data", split, "twice")) for split in ("train", "validation"))
    assert not train.keys() & validation.keys()
    assert set(train.values()) == set(validation.values()) == {2}


def test_a_document_stays_on_its_side_when_others_come(corpus: Path, tmp_path: Path) -> None:
    few = write_corpus(tmp_path / "corpus", documents=30)
    sides = []
    for name, folder in (("few", few), ("all", corpus)):
        prepare(text_spec(folder, "data.validation_fraction=0.3"), tmp_path / f"data-{name}", processes=1)
        sides.append(set(documents_of(tmp_path / f"data-{name}", "validation")))
    assert sides[0] <= sides[1]


def test_a_text_that_spells_end_of_text_ends_no_document(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "forged.txt").write_text("one document<|endoftext|>and still the same")
    manifest = prepare(text_spec(corpus), tmp_path / "data", processes=1)
    splits = [TokenShards(tmp_path / "data", manifest, "corpus", split) for split in ("train", "validation")]
    assert sum(int((split.read(0, len(split)) == manifest.end_of_text_id).sum()) for split in splits) == 41


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_small_source_leaves_neither_split_empty(tmp_path: Path, fraction: float) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=3, words=1200)
    manifest = prepare(text_spec(corpus, f"data.validation_fraction={fraction}"), tmp_path / "data", processes=1)
    assert sorted(stream.documents for stream in manifest.sources[0].streams.values()) == [1, 2]


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("the only one")
    with pytest.raises(DataError, match=r"data.sources: given 1 document; .* split the text into several files"):
        prepare(text_spec(tmp_path / "only.txt"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_fraction_that_leaves_too_little_to_train_on_is_refused(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=40, words=12)
    # together enough for the vocabulary, and each shorter than a sample
    spec = text_spec(corpus, "data.validation_fraction=0.999", "tokenizer.vocab_size=330", "batch.sequence_length=256")
    with pytest.raises(DataError, match=r"data.validation_fraction: given 0.999, which leaves \d+ tokens to train on"):
        prepare(spec, tmp_path / "data", processes=1)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_validation_sources_are_only_validated_on(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "exam.txt").write_text("what the model is asked")
    spec = text_spec(
        corpus,
        f"data.validation_sources=[{{kind: text, path: '{tmp_path / 'exam.txt'}'}}]",
        "data.validation_fraction=0",
    )
    manifest = prepare(spec, tmp_path / "data", processes=1)
    streams = {source.label: sorted(source.streams) for source in manifest.sources}
    assert streams == {"corpus": ["train"], "exam": ["validation"]}
    assert documents_of(tmp_path / "data", "validation", "exam") == ["what the model is asked"]


# --- what is left out -------------------------------------------------------------------------------------------------


def test_duplicates_are_dropped_on_request_and_counted(corpus: Path, tmp_path: Path) -> None:
    again = write_corpus(tmp_path / "again", documents=10)
    (again / "new.txt").write_text("nowhere else")
    manifest = prepare(two_sources(corpus, again, "data.drop_duplicates=true"), tmp_path / "data", processes=1)
    one, other = manifest.sources
    assert (one.documents, one.dropped) == (40, {})
    assert (other.documents, other.dropped) == (1, {"duplicate": 10})
    assert other.text_bytes == len("nowhere else")


def test_of_a_training_and_a_validation_copy_the_training_copy_is_dropped(corpus: Path, tmp_path: Path) -> None:
    exam = write_corpus(tmp_path / "exam", documents=5)
    spec = text_spec(corpus, f"data.validation_sources=[{{kind: text, path: '{exam}'}}]", "data.drop_duplicates=true")
    manifest = prepare(spec, tmp_path / "data", processes=1)
    counts = {source.label: (source.documents, source.dropped) for source in manifest.sources}
    assert counts == {"corpus": (35, {"duplicate": 5}), "exam": (5, {})}


def test_short_and_empty_documents_are_counted_by_reason(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "short.txt").write_text("nineteen characters")
    (corpus / "long-enough.txt").write_text("twenty characters in")
    (corpus / "white.txt").write_text(" \n" * 50)
    manifest = prepare(text_spec(corpus, "data.min_document_characters=20"), tmp_path / "data", processes=1)
    assert manifest.documents == 41
    assert manifest.sources[0].dropped == {"empty": 1, "too short": 1}


def test_a_source_of_which_nothing_is_left_is_told(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match=r"short.txt'?: every document was dropped \(1 too short\)"):
        prepare(two_sources(corpus, tmp_path / "short.txt", "data.min_document_characters=20"), tmp_path / "data")
    assert not (tmp_path / "data" / "manifest.json").exists()


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
def test_one_and_three_processes_write_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    spec = text_spec(corpus, "data.shard_tokens=2000")
    for processes in (1, 3):
        prepare(spec, tmp_path / f"by-{processes}", processes=processes)
    written = contents(tmp_path / "by-1")
    assert {"manifest.json", "corpus-train-00001.bin", "corpus-train-00001.idx", "tokenizer/tokenizer.json"} <= set(
        written
    )
    assert written == contents(tmp_path / "by-3")


@pytest.mark.usefixtures("small_pieces")
def test_the_size_of_pieces_shows_in_no_byte(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(text_spec(corpus), tmp_path / "small", processes=1)
    monkeypatch.undo()
    prepare(text_spec(corpus), tmp_path / "large", processes=1)
    assert contents(tmp_path / "small") == contents(tmp_path / "large")


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("drops", ["false", "true"])
def test_interrupted_after_every_piece_it_ends_with_the_same_bytes(corpus: Path, tmp_path: Path, drops: str) -> None:
    spec = text_spec(corpus, "data.shard_tokens=2000", f"data.drop_duplicates={drops}")
    prepare(spec, tmp_path / "clean", processes=1)

    def interrupt(progress: Progress) -> None:
        if progress.tokens:
            raise Killed

    attempts = 0
    while not (tmp_path / "data" / "manifest.json").exists():
        attempts += 1
        try:
            prepare(spec, tmp_path / "data", processes=1, on_progress=interrupt)
        except Killed:
            assert [path.name for path in (tmp_path / "data").iterdir()] == [".partial"]
    assert attempts > 10
    assert contents(tmp_path / "data") == contents(tmp_path / "clean")


@pytest.mark.usefixtures("small_pieces")
def test_sources_that_change_between_attempts_are_prepared_anew(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")

    def interrupt(progress: Progress) -> None:
        if progress.documents > 20:
            raise Killed

    with pytest.raises(Killed):
        prepare(text_spec(corpus), tmp_path / "data", processes=1, on_progress=interrupt)
    (corpus / "document-000.txt").write_text("another beginning")
    prepare(text_spec(corpus), tmp_path / "data", processes=1)
    prepare(text_spec(corpus), tmp_path / "clean", processes=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "clean")


def test_an_attempt_with_other_settings_starts_over(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.tokens:
            raise Killed

    with pytest.raises(Killed):
        prepare(text_spec(corpus), tmp_path / "data", processes=1, on_progress=interrupt)
    other = text_spec(corpus, "tokenizer.vocab_size=450")
    prepare(other, tmp_path / "data", processes=1)
    assert "begun with other settings; starting over" in caplog.text
    prepare(other, tmp_path / "clean", processes=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "clean")


def test_a_preparation_killed_while_files_move_to_their_place_is_finished(corpus: Path, tmp_path: Path) -> None:
    prepare(text_spec(corpus), tmp_path / "clean", processes=1)
    data = tmp_path / "data"
    (data / ".partial" / "shards").mkdir(parents=True)
    settings = {name: value for name, value in read_manifest(tmp_path / "clean").inputs.items()}
    (data / ".partial" / "settings.json").write_text(json.dumps(settings, sort_keys=True))
    for name, content in contents(tmp_path / "clean").items():
        moved = name.startswith(("corpus-train", "tokenizer"))
        place = data / name if moved else data / ".partial" / ("" if name == "manifest.json" else "shards") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    prepare(text_spec(corpus), data, processes=1)
    assert contents(data) == contents(tmp_path / "clean")


# --- the folder -------------------------------------------------------------------------------------------------------


def test_prepared_data_is_reused(corpus: Path, tmp_path: Path) -> None:
    first = prepare(text_spec(corpus), tmp_path / "data", processes=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    elsewhere = text_spec(
        corpus,
        f"data.directory={tmp_path / 'data'}",
        "data.packing=best_fit",
        f"data.sources=[{{kind: text, path: '{corpus}', weight: 0.3, label: corpus}}]",
        name="another-name",
    )
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


def test_two_preparations_of_one_folder_do_not_meet(corpus: Path, tmp_path: Path) -> None:
    def meet(progress: Progress) -> None:
        if not progress.tokens:
            with pytest.raises(UserError, match=r"another process prepares data there; wait for it"):
                prepare(text_spec(corpus), tmp_path / "data", processes=1)

    prepare(text_spec(corpus), tmp_path / "data", processes=1, on_progress=meet)
    assert (tmp_path / "data" / "manifest.json").exists()


def test_several_sources_are_counted_each(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(two_sources(corpus, corpus / "document-000.txt"), tmp_path / "data", processes=1)
    assert [(source.label, source.documents) for source in manifest.sources] == [("one", 40), ("other", 1)]
    assert [source.source for source in manifest.sources] == [
        f"text source '{corpus}'",
        f"text source '{corpus / 'document-000.txt'}'",
    ]


def test_a_source_that_is_missing_is_told_before_anything_is_read(corpus: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    with pytest.raises(DataError, match="nowhere"):
        prepare(two_sources(corpus, tmp_path / "nowhere"), tmp_path / "data", on_progress=seen.append)
    assert seen == [Progress()]
    assert not (tmp_path / "data").exists()


def test_a_failure_before_the_first_piece_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the text is too short for more than"):
        prepare(text_spec(corpus, "tokenizer.vocab_size=9999"), tmp_path / "data", processes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_one_line_and_leaves_nothing_half_written(corpus: Path, tmp_path: Path) -> None:
    with (
        largest_file(bytes_allowed=4096),
        pytest.raises(DsllmError, match=r"preparing failed \(.*\); mend that, or set data.directory elsewhere"),
    ):
        prepare(text_spec(corpus), tmp_path / "data", processes=1)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def largest_file(bytes_allowed: int) -> Iterator[None]:
    """Writes beyond this size fail in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deadly:
    """A piece that ends the process that receives it."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (1,)


def test_a_worker_that_dies_is_one_line(corpus: Path, tmp_path: Path) -> None:
    manifest = prepare(text_spec(corpus), tmp_path / "data", processes=1)
    recipe = Recipe(
        threshold=0,
        vocab_size=manifest.vocab_size,
        end_of_text_id=manifest.end_of_text_id,
        tokenizer_sha256=manifest.tokenizer_sha256,
    )
    encoding = recipe.encoding(text_spec(corpus), tmp_path / "data")
    tasks = [Task(Deadly(), tmp_path / "piece")] * encode._PIECES_WORTH_PROCESSES
    with (
        pytest.raises(DsllmError, match="a tokenizing process died, most likely for lack of memory; try --processes"),
        encoder(processes=2, much=False) as encode_pieces,
    ):
        list(encode_pieces(encoding, tasks))


def test_progress_counts_up_to_the_whole(corpus: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    manifest = prepare(text_spec(corpus), tmp_path / "data", processes=1, on_progress=seen.append)
    size_bytes = sum(path.stat().st_size for path in corpus.iterdir())
    assert seen[0] == Progress()
    assert seen[-1] == Progress(manifest.documents, manifest.text_bytes, manifest.tokens, size_bytes, size_bytes)


def test_the_default_folder_follows_the_name_unless_it_is_given() -> None:
    assert default_directory(text_spec("anything")) == Path("data/small")
    assert default_directory(text_spec("anything", "data.directory=elsewhere")) == Path("elsewhere")
