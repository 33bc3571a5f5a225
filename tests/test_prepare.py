"""Preparation: the same bytes however it is done, a clean split, and a folder that is complete or untouched."""

from __future__ import annotations

import os
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_text import text_spec, write_corpus

from dsllm.data.preparation import assemble, encode, join
from dsllm.data.preparation.encode import Encoding, Task, encoder
from dsllm.data.preparation.join import Joiner
from dsllm.data.preparation.pipeline import Progress
from dsllm.data.preparation.recipe import Recipe
from dsllm.data.prepare import default_directory, prepare
from dsllm.data.shards import Split, TokenShards, read_manifest
from dsllm.data.sources import text
from dsllm.data.sources.piece import Document
from dsllm.data.token_ids import TokenIds
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


def test_too_little_text_beside_validation_sources_blames_no_fraction(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=40, words=12)
    spec = text_spec(
        corpus,
        f"data.validation_sources=[{{kind: text, path: '{corpus}', label: again}}]",
        "data.validation_fraction=0",
        "tokenizer.vocab_size=330",
    )
    short = spec.model_copy(update={"batch": spec.batch.model_copy(update={"sequence_length": 10_000})})
    with pytest.raises(DataError, match=r"data.sources: there are \d+ tokens to train on; one sample needs 10001"):
        prepare(short, tmp_path / "data", processes=1)


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


@contextmanager
def killed_at(owner: Any, name: str, instead: Any = None) -> Iterator[None]:
    """The block is killed where it calls `owner.name`, or where the function in its place does."""

    def kill(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):  # noqa: PT012 - the block is the caller's
        patch.setattr(owner, name, instead or kill)
        yield


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


def test_unfinished_work_is_not_lost_to_another_spec(corpus: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.tokens:
            raise Killed

    with pytest.raises(Killed):
        prepare(text_spec(corpus), tmp_path / "data", processes=1, on_progress=interrupt)
    before = contents(tmp_path / "data")
    with pytest.raises(
        UserError, match=r"\.partial: begun with other values of tokenizer.vocab_size; set them back to go on there"
    ):
        prepare(text_spec(corpus, "tokenizer.vocab_size=450"), tmp_path / "data", processes=1)
    assert contents(tmp_path / "data") == before
    prepare(text_spec(corpus), tmp_path / "data", processes=1)


def test_text_that_changed_before_anything_was_joined_gives_another_vocabulary_too(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")

    def interrupt(progress: Progress) -> None:
        if progress.tokens:
            raise Killed

    with pytest.raises(Killed):
        prepare(text_spec(corpus), tmp_path / "data", processes=1, on_progress=interrupt)
    (corpus / "document-000.txt").write_text("another beginning " * 300)
    prepare(text_spec(corpus), tmp_path / "data", processes=1)
    prepare(text_spec(corpus), tmp_path / "clean", processes=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "clean")


@pytest.mark.usefixtures("small_pieces")
def test_with_copies_dropped_a_source_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    spec = text_spec(corpus, "data.drop_duplicates=true")

    with killed_at(Joiner, "finish"):
        prepare(spec, tmp_path / "data", processes=1)
    for path in sorted(corpus.iterdir())[30:]:
        path.unlink()
    assert prepare(spec, tmp_path / "data", processes=1).documents == 30


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("damage", [b"", b"PK\3\4 and no more"])
def test_pieces_that_a_power_cut_damaged_are_made_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    spec = text_spec(corpus)
    prepare(spec, tmp_path / "clean", processes=1)

    monkeypatch.setattr(join, "_PIECES_BETWEEN_NOTES", 1000)
    with killed_at(Joiner, "finish"):
        prepare(spec, tmp_path / "data", processes=1)
    pieces = sorted((tmp_path / "data" / ".partial" / "pieces").rglob("*.npz"))
    for path in pieces[2:6]:
        path.write_bytes(damage)
    prepare(spec, tmp_path / "data", processes=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "clean")


@pytest.mark.parametrize("name", ["tokenizer.json", "sentencepiece.model"])
def test_a_tokenizer_that_a_power_cut_damaged_is_made_again(corpus: Path, tmp_path: Path, name: str) -> None:
    prepare(text_spec(corpus), tmp_path / "clean", processes=1)

    def interrupt(progress: Progress) -> None:
        if progress.tokens:
            raise Killed

    with pytest.raises(Killed):
        prepare(text_spec(corpus), tmp_path / "data", processes=1, on_progress=interrupt)
    (tmp_path / "data" / ".partial" / "tokenizer" / name).write_bytes(b"")
    prepare(text_spec(corpus), tmp_path / "data", processes=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "clean")


def test_weights_show_in_no_prepared_byte(corpus: Path, tmp_path: Path) -> None:
    again = write_corpus(tmp_path / "again", documents=9)
    for name, weights in (("absent", (None, None)), ("given", (0.9, 0.1))):
        spec = two_sources(corpus, again)
        sources = tuple(
            source.model_copy(update={"weight": weight})
            for source, weight in zip(spec.data.sources, weights, strict=True)
        )
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"sources": sources})})
        prepare(spec, tmp_path / name, processes=1)
    assert contents(tmp_path / "absent") == contents(tmp_path / "given")


@pytest.mark.parametrize("moved", [0, 1, 2, 3, 5])
def test_a_preparation_killed_while_files_move_to_their_place_is_finished(
    corpus: Path, tmp_path: Path, moved: int
) -> None:
    prepare(text_spec(corpus), tmp_path / "clean", processes=1)
    moves = 0

    def move(source: Path, target: Path) -> None:
        nonlocal moves
        if moves == moved:
            raise Killed
        moves += 1
        os.rename(source, target)

    with killed_at(assemble, "os", SimpleNamespace(replace=move)):
        prepare(text_spec(corpus), tmp_path / "data", processes=1)
    assert not (tmp_path / "data" / "manifest.json").exists()
    prepare(text_spec(corpus), tmp_path / "data", processes=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "clean")


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
    with pytest.raises(UserError, match=r"holds .*, which dsllm did not prepare; choose an empty folder"):
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
        tokenizer_files={},
        stamps={},
    )
    encoding = recipe.encoding(text_spec(corpus), tmp_path / "data")
    tasks = [Task(Deadly(), tmp_path / "piece")] * encode._PIECES_WORTH_PROCESSES
    with (
        pytest.raises(DsllmError, match="a tokenizing process died, most likely for lack of memory; try --processes"),
        encoder(processes=2, much=False) as encode_pieces,
    ):
        list(encode_pieces(encoding, tasks))


@dataclass(frozen=True)
class Texts:
    """A piece of these documents."""

    texts: tuple[str, ...]
    name: str = "texts"
    stamp: str = ""
    size_bytes: int = 1
    state: None = None

    def documents(self, dropped: Counter[str]) -> Iterator[Document]:
        return (Document(f"text {index}", text) for index, text in enumerate(self.texts))


@pytest.mark.parametrize(
    ("vocab_size", "end_of_text_id", "message"),
    [
        (300, 1, r"text 0: the tokenizer gives it the token \d+, but says that it has 300 tokens"),
        (400, None, r"text 0: the tokenizer reads its end-of-text token out of the text"),
    ],
)
def test_ids_that_cannot_be_right_are_refused(
    corpus: Path, tmp_path: Path, vocab_size: int, end_of_text_id: int | None, message: str
) -> None:
    prepare(text_spec(corpus), tmp_path / "data", processes=1)
    text = (corpus / "document-000.txt").read_text()
    (ids,) = TokenIds.open(tmp_path / "data" / "tokenizer").encode([text])
    end = int(ids[0]) if end_of_text_id is None else end_of_text_id
    encoding = Encoding(tmp_path / "data" / "tokenizer", end, vocab_size, 0)
    with pytest.raises(DataError, match=message), encoder(processes=1, much=False) as encode_pieces:
        list(encode_pieces(encoding, [Task(Texts((text,)), tmp_path / "piece.npz")]))
    assert not (tmp_path / "piece.npz").exists()


def test_progress_counts_up_to_the_whole(corpus: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    manifest = prepare(text_spec(corpus), tmp_path / "data", processes=1, on_progress=seen.append)
    size_bytes = sum(path.stat().st_size for path in corpus.iterdir())
    assert seen[0] == Progress()
    assert seen[-1] == Progress(manifest.documents, manifest.text_bytes, manifest.tokens, size_bytes, size_bytes)


def test_the_default_folder_follows_the_name_unless_it_is_given() -> None:
    assert default_directory(text_spec("anything")) == Path("data/small")
    assert default_directory(text_spec("anything", "data.directory=elsewhere")) == Path("elsewhere")
