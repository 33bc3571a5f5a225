"""Sources of every kind: which documents they keep, and what they say when they cannot be read."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from read_sources import read

from dsllm.data.sources.catalogue import documents, kept_documents, open_source
from dsllm.data.sources.files import find_files
from dsllm.data.sources.messages import describe
from dsllm.data.sources.piece import Document
from dsllm.errors import DataError
from dsllm.spec.sections import HuggingFaceSource, JsonlSource, ParquetSource, PythonStdlibSource, Source, TextSource


def text(path: Path | str) -> TextSource:
    return TextSource(kind="text", path=str(path))


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
    found = dict(read(open_source(PythonStdlibSource(kind="python-stdlib"))))
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


def test_a_moved_folder_gives_the_same_names(corpus: Path, tmp_path: Path) -> None:
    before = [(piece.name, piece.stamp) for piece in open_source(text(corpus)).pieces(lambda name: None)]
    corpus.rename(tmp_path / "elsewhere")
    moved = open_source(text(tmp_path / "elsewhere")).pieces(lambda name: None)
    assert [(piece.name, piece.stamp) for piece in moved] == before


def test_a_home_folder_is_written_with_a_tilde(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(corpus.parent))
    assert [file.name for file in find_files(text("~/corpus/*.md"), (".txt",))] == ["a.md"]


def test_documents_of_white_space_and_short_ones_are_counted(corpus: Path) -> None:
    (corpus / "empty.txt").write_text("")
    (corpus / "white.txt").write_text(" \n\t\n")
    dropped: Counter[str] = Counter()
    (piece,) = open_source(text(corpus)).pieces(lambda name: None)
    assert [document.text for document in kept_documents(piece, 6, dropped)] == ["second"]
    assert dropped == {"empty": 2, "too short": 2}


def test_an_empty_text_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(DataError, match=r"text source '.*empty\.txt': every document was dropped \(1 empty\)"):
        list(documents(text(tmp_path / "empty.txt")))


@pytest.mark.parametrize(
    "source",
    [TextSource(kind="text", path="."), JsonlSource(kind="jsonl", path="."), ParquetSource(kind="parquet", path=".")],
    ids=lambda source: source.kind,
)
def test_a_folder_without_files_is_an_error(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.bin").write_bytes(b"")
    with pytest.raises(DataError, match=f"{source.kind} source '.': there is no text in it; point it to files"):
        open_source(source)


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for name in ("nowhere", "nowhere/*.txt"):
        with pytest.raises(DataError, match=r"text source '.*/nowhere.*': no file, folder or match of that name"):
            open_source(text(tmp_path / name))


def test_a_link_to_nothing_names_itself(corpus: Path) -> None:
    (corpus / "lost.txt").symlink_to(corpus / "gone.txt")
    with pytest.raises(DataError, match=r"lost\.txt: cannot be read \(No such file or directory\); mend that"):
        open_source(text(corpus))


def test_a_name_that_is_not_utf8_is_refused(corpus: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        (corpus / name).write_text("text")
    except OSError:
        pytest.skip("this file system has names of UTF-8 alone")
    for path in (corpus, corpus / "*.txt"):
        with pytest.raises(DataError, match=r"'.*caf\\udce9\.txt': the name is not UTF-8; rename the file") as caught:
            open_source(text(path))
        assert str(caught.value).isascii()


def test_linked_folders_are_read_as_a_glob_reads_them(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "deep" / "d.txt").write_text("fourth")
    (corpus / "linked").symlink_to(tmp_path / "more")
    (corpus / ".hidden").symlink_to(tmp_path / "more")
    names = [file.name for file in find_files(text(corpus), (".txt",))]
    assert names == [file.name for file in find_files(text(corpus / "**" / "*.txt"), ())]
    assert names == ["b.txt", "linked/deep/d.txt"]


def test_links_in_a_circle_end(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.txt").write_text("fourth")
    (tmp_path / "more" / "back").symlink_to(corpus)
    (corpus / "linked").symlink_to(tmp_path / "more")
    (corpus / "deep" / "self").symlink_to(".")
    (corpus / "above").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in (corpus, "corpus"):
        assert [file.name for file in find_files(text(path), (".txt",))] == ["b.txt", "linked/d.txt"]


def test_a_folder_that_cannot_be_read_names_itself(corpus: Path) -> None:
    """Its path is longer than the system takes, which not even the superuser may read."""
    folder = os.open(corpus, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("x" * 250, dir_fd=folder)
        inner = os.open("x" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    with pytest.raises(DataError, match=r"corpus/x.*: cannot be read \(File name too long\); mend that"):
        open_source(text(corpus))


def test_sources_are_described_by_what_the_spec_says() -> None:
    assert describe(PythonStdlibSource(kind="python-stdlib")) == "python-stdlib source"
    assert describe(HuggingFaceSource(kind="huggingface", name="a/b")) == "huggingface source 'a/b'"


def test_a_document_is_keyed_by_its_text_alone() -> None:
    assert Document("a", "text").key == Document("b", "text").key != Document("a", "other").key
    assert len(Document("a", "half a pair \ud800").key) == 16


def test_plain_text_needs_no_other_library(corpus: Path) -> None:
    code = (
        "import sys; from dsllm.data.sources.catalogue import documents; "
        "from dsllm.spec.sections import TextSource; "
        f"assert len(list(documents(TextSource(kind='text', path={str(corpus)!r})))) == 3; "
        "assert not {'numpy', 'pyarrow', 'datasets', 'torch', 'deeplake'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
