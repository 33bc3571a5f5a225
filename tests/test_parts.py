"""Preparation in parts: joined, they are what one machine would have prepared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_text import text_spec, write_corpus
from test_prepare import contents, killed_at

from dsllm.data.preparation.join import Joiner
from dsllm.data.preparation.parts import merge, parse_part, part_directory, prepare_part
from dsllm.data.preparation.pipeline import Part
from dsllm.data.prepare import prepare
from dsllm.data.sources import text
from dsllm.errors import DsllmError, UserError
from dsllm.spec.sections import Spec


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_BYTES", 3000)


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    corpus = write_corpus(tmp_path / "corpus")
    again = write_corpus(tmp_path / "again", documents=10)
    (again / "new.txt").write_text("nowhere else")
    sources = f"data.sources=[{{kind: text, path: '{corpus}'}}, {{kind: text, path: '{again}'}}]"
    return text_spec(corpus, sources, "data.shard_tokens=2000", "data.drop_duplicates=false")


def made(spec: Spec, folder: Path, of: int) -> list[Path]:
    folders = [folder / f"part-{number}" for number in range(1, of + 1)]
    for number, part in enumerate(folders, start=1):
        prepare_part(spec, part, Part(number, of), processes=1)
    return folders


@pytest.mark.parametrize("drops", ["false", "true"])
def test_three_parts_join_to_the_bytes_of_one_machine(spec: Spec, tmp_path: Path, drops: str) -> None:
    again = spec.model_copy(update={"data": spec.data.model_copy(update={"drop_duplicates": drops == "true"})})
    prepare(again, tmp_path / "whole", processes=1)
    parts = made(again, tmp_path, of=3)
    before = {part: contents(part) for part in parts}
    merge(again, tmp_path / "data", list(reversed(parts)))
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert before == {part: contents(part) for part in parts}


def test_more_parts_than_pieces_are_no_fault(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_BYTES", 10**6)
    prepare(spec, tmp_path / "whole", processes=1)
    merge(spec, tmp_path / "data", made(spec, tmp_path, of=5))
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_part_that_is_there_is_made_again_only_where_pieces_are_missing(spec: Spec, tmp_path: Path) -> None:
    (part, _) = made(spec, tmp_path, of=2)
    pieces = sorted((part / "pieces").rglob("*.npz"))
    pieces[0].unlink()
    times = {piece: piece.stat().st_mtime_ns for piece in pieces[1:]}
    prepare_part(spec, part, Part(1, 2), processes=1)
    assert sorted((part / "pieces").rglob("*.npz")) == pieces
    assert times == {piece: piece.stat().st_mtime_ns for piece in pieces[1:]}


def test_a_missing_part_is_named(spec: Spec, tmp_path: Path) -> None:
    parts = made(spec, tmp_path, of=3)
    with pytest.raises(UserError, match=r"given parts 1, 3 of 3; each is needed once; prepare 2 too"):
        merge(spec, tmp_path / "data", [parts[0], parts[2]])
    assert not (tmp_path / "data").exists()


def test_a_part_that_is_named_twice_is_refused(spec: Spec, tmp_path: Path) -> None:
    parts = made(spec, tmp_path, of=2)
    copy = shutil.copytree(parts[0], tmp_path / "copy")
    with pytest.raises(UserError, match=r"given parts 1, 1, 2 of 2; each is needed once; name no part twice"):
        merge(spec, tmp_path / "data", [*parts, copy])


def test_an_unfinished_part_is_refused(spec: Spec, tmp_path: Path) -> None:
    parts = made(spec, tmp_path, of=2)
    (parts[1] / "part.json").unlink()
    with pytest.raises(UserError, match=r"part-2: no finished part in it .* it goes on where it was interrupted"):
        merge(spec, tmp_path / "data", parts)


def test_parts_of_another_spec_are_refused(spec: Spec, tmp_path: Path) -> None:
    parts = made(spec, tmp_path, of=2)
    other = spec.model_copy(update={"data": spec.data.model_copy(update={"validation_fraction": 0.2})})
    with pytest.raises(UserError, match=r"part-1: prepared from a spec with other values of data.validation_fraction"):
        merge(other, tmp_path / "data", parts)


def test_parts_of_different_text_are_refused(spec: Spec, tmp_path: Path) -> None:
    parts = made(spec, tmp_path, of=2)
    shutil.rmtree(parts[1])
    write_corpus(tmp_path / "corpus", documents=60)
    prepare_part(spec, parts[1], Part(2, 2), processes=1)
    with pytest.raises(UserError, match=r"part-2: does not belong with .*part-1; their number of parts, tokenizer or"):
        merge(spec, tmp_path / "data", parts)


def test_a_part_leaves_a_folder_of_somebody_alone(spec: Spec, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"home: holds thesis.tex, which dsllm did not prepare; choose an empty folder"):
        prepare_part(spec, tmp_path / "home", Part(1, 2), processes=1)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_part_does_not_take_the_place_of_another(spec: Spec, tmp_path: Path) -> None:
    prepare_part(spec, tmp_path / "part", Part(1, 2), processes=1)
    before = contents(tmp_path / "part")
    with pytest.raises(UserError, match=r"part: begun with other values of part; set them back"):
        prepare_part(spec, tmp_path / "part", Part(2, 2), processes=1)
    assert contents(tmp_path / "part") == before


def test_a_part_is_not_made_in_a_folder_of_prepared_data(spec: Spec, tmp_path: Path) -> None:
    prepare(spec, tmp_path / "data", processes=1)
    before = contents(tmp_path / "data")
    with pytest.raises(UserError, match="which dsllm did not prepare; choose an empty folder"):
        prepare_part(spec, tmp_path / "data", Part(1, 2), processes=1)
    assert contents(tmp_path / "data") == before


def test_parts_of_different_text_are_refused_where_the_tokenizer_does_not_tell(spec: Spec, tmp_path: Path) -> None:
    prepare(spec, tmp_path / "whole", processes=1)
    pretrained = {"kind": "pretrained", "name": str(tmp_path / "whole" / "tokenizer")}
    fields = spec.model_dump()
    other = Spec.model_validate({**fields, "tokenizer": pretrained, "model": {**fields["model"], "vocab_size": 400}})
    parts = made(other, tmp_path, of=2)
    shutil.rmtree(parts[1])
    first, second = (tmp_path / "corpus" / f"document-0{number}.txt" for number in ("00", "30"))
    first.write_text(first.read_text() + "x" * 40)
    second.write_text(second.read_text()[:-40])
    prepare_part(other, parts[1], Part(2, 2), processes=1)
    with pytest.raises(UserError, match=r"part-2: does not belong with .*part-1"):
        merge(other, tmp_path / "data", parts)


def test_a_part_that_was_made_again_between_two_merges_is_noticed(spec: Spec, tmp_path: Path) -> None:
    parts = made(spec, tmp_path, of=2)

    with killed_at(Joiner, "finish"):
        merge(spec, tmp_path / "data", parts)
    (tmp_path / "corpus" / "document-005.txt").write_text("something else altogether")
    for number, part in enumerate(parts, start=1):
        shutil.rmtree(part)
        prepare_part(spec, part, Part(number, 2), processes=1)
    with pytest.raises(UserError, match=r"\.partial: begun with other values of parts; set them back"):
        merge(spec, tmp_path / "data", parts)
    shutil.rmtree(tmp_path / "data")
    merge(spec, tmp_path / "data", parts)
    prepare(spec, tmp_path / "whole", processes=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_no_parts_at_all_says_how_to_make_them(spec: Spec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.parts: no parts there; make them with dsllm data prepare --shard 1/8"):
        merge(spec, tmp_path / "data", [])


def test_a_damaged_piece_of_a_part_is_named(spec: Spec, tmp_path: Path) -> None:
    parts = made(spec, tmp_path, of=2)
    piece = sorted((parts[1] / "pieces").rglob("*.npz"))[2]
    piece.write_bytes(piece.read_bytes()[:50])
    with pytest.raises(DsllmError, match=f"{piece.name}: damaged, and deleted; prepare that part again"):
        merge(spec, tmp_path / "data", parts)
    prepare_part(spec, parts[1], Part(2, 2), processes=1)
    merge(spec, tmp_path / "data", parts)


@pytest.mark.parametrize("text", ["0/3", "4/3", "2", "two/3", "1/0", "-1/3", ""])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--shard: given '.*'; .* write 1/8 for the first of 8"):
        parse_part(text)


def test_parts_lie_beside_the_folder_that_they_are_for() -> None:
    assert part_directory(Path("data/my"), parse_part("2/8")) == Path("data/my.parts/2-of-8")
