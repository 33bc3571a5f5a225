"""Text to ids in words and slices: exactly the ids that the libraries give to the whole text."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_text import write_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from dsllm.data import token_ids
from dsllm.data.token_ids import SENTENCEPIECE_FILE, TOKENIZER_FILE, TokenIds, read_tokenizer, slices
from dsllm.data.vocabulary import END_OF_TEXT, fast_tokenizer, train_bpe, train_sentencepiece
from dsllm.errors import DataError
from dsllm.spec.sections import BpeTokenizer, SentencePieceTokenizer

GPT2 = Path(__file__).resolve().parents[2] / "shared/data/gpt2-tokenizer"
KINDS = ["byte-level", "bpe", "unigram", *(["gpt2"] if GPT2.is_dir() else [])]
SOURCES = sorted(Path(token_ids.__file__).parents[1].rglob("*.py"))
FOLDERS = tempfile.TemporaryDirectory()
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000"
CONTROLS = "\0\x1b\x1c\x1d\x1e\x1f\x7f\u180e\u200b\u2581\ufeff"

awkward_text = st.lists(
    st.one_of(
        st.text(max_size=5),
        st.text("ab19 '._\n-é中²\u0301", max_size=8),
        st.text(WHITE_SPACE, max_size=4),
        st.sampled_from([*CONTROLS, "'s", "'ll", " don't", "I'Ve", "🙂", "👩\u200d🚀", END_OF_TEXT, "<unk>", "<0x41>"]),
    ),
    max_size=12,
).map("".join)


@cache
def texts() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in SOURCES]


@cache
def folder(kind: str) -> Path:
    """A tokenizer's folder as preparation leaves it."""
    path = Path(FOLDERS.name) / kind
    path.mkdir()
    if kind == "gpt2":
        AutoTokenizer.from_pretrained(GPT2).save_pretrained(path)
    elif kind == "byte-level":
        train_bpe(BpeTokenizer(kind="bpe", vocab_size=1200), texts()).save(str(path / TOKENIZER_FILE))
    else:
        config = SentencePieceTokenizer(kind="sentencepiece", vocab_size=1200, algorithm=kind)
        model_file = train_sentencepiece(config, texts())
        (path / SENTENCEPIECE_FILE).write_bytes(model_file)
        fast_tokenizer(model_file).save(str(path / TOKENIZER_FILE))
    return path


@cache
def pair(kind: str) -> tuple[TokenIds, Tokenizer]:
    """Ours, and the library's tokenizer with special tokens as text."""
    whole = read_tokenizer(folder(kind))
    whole.encode_special_tokens = True
    return TokenIds.open(folder(kind)), whole


def assert_as_the_library(kind: str, text: str) -> None:
    ours, whole = pair(kind)
    (ids,) = ours.encode([text])
    assert ids.tolist() == whole.encode(text, add_special_tokens=False).ids
    assert whole.decode(ids.tolist(), skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None)
@given(text=awkward_text)
@example(text="")
@example(text="x \n \xa0y  \u3000 z\u2028")
@example(text="a\x1c b \x1f\x1e c")
@example(text="'sé don'té 'S 12é é12 --é  é")
def test_ids_are_those_of_the_whole_text_and_the_text_comes_back(kind: str, text: str) -> None:
    assert_as_the_library(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_over_python_source_are_those_of_the_library(kind: str) -> None:
    ours, whole = pair(kind)
    expected = whole.encode_batch_fast(texts(), add_special_tokens=False)
    assert [ids.tolist() for ids in ours.encode(texts())] == [encoding.ids for encoding in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_every_character_beside_letters_digits_and_spaces_gets_the_ids_of_the_library(kind: str) -> None:
    characters = [chr(code) for code in range(0x3100) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 512):
        assert_as_the_library(kind, "".join(f"a{c}1{c} {c}  {c}.{c}{c}\n" for c in characters[start : start + 512]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_slices_has_the_ids_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_ids, "_SLICE_CHARACTERS", 700)
    monkeypatch.setattr(token_ids, "_SENTENCEPIECE_CHARACTERS", 200)
    for text in texts()[:8]:
        assert_as_the_library(kind, text)


@given(text=awkward_text, characters=st.integers(1, 9))
def test_slices_are_the_whole_text_and_none_is_too_long(text: str, characters: int) -> None:
    parts = list(slices(text, characters))
    assert "".join(parts) == text
    assert all(len(part) <= characters for part in parts)
    assert len(parts) == 1 or all(parts)


def test_a_slice_ends_before_a_space_then_before_a_newline_then_anywhere() -> None:
    assert list(slices("one two  three", 9)) == ["one two", "  three"]
    assert list(slices("one\ntwo\nthree", 9)) == ["one\ntwo", "\nthree"]
    assert list(slices("onetwothree", 9)) == ["onetwothr", "ee"]


def test_ids_are_sixteen_bits_where_that_holds_the_vocabulary() -> None:
    (ids,) = pair("bpe")[0].encode(["a b"])
    assert ids.dtype == np.uint16


def test_a_vocabulary_beyond_sixteen_bits_has_wider_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 2**16, "b": 1, "<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / TOKENIZER_FILE))
    (ids,) = TokenIds.open(tmp_path).encode(["a b c"])
    assert ids.tolist() == [2**16, 1, 0]
    assert ids.dtype == np.uint32


def changed(kind: str, change: Any) -> Tokenizer:
    tokenizer = Tokenizer.from_str(pair(kind)[1].to_str())
    change(tokenizer)
    return tokenizer


def test_other_tokenizers_are_encoded_as_they_are(tmp_path: Path) -> None:
    tokenizer = changed("byte-level", lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(True)))
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / TOKENIZER_FILE))
    tokenizer.no_truncation()
    expected = tokenizer.encode_batch(texts()[:4], add_special_tokens=False)
    assert [ids.tolist() for ids in TokenIds.open(tmp_path).encode(texts()[:4])] == [item.ids for item in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_surrogate_is_read_as_the_replacement_character(kind: str) -> None:
    ours, _ = pair(kind)
    broken, mended = ours.encode(["a\ud83d b é", "a\ufffd b é"])
    assert broken.tolist() == mended.tolist()


def test_decoding_bytes_of_the_fallback_returns_the_text() -> None:
    assert isinstance(pair("bpe")[1].decoder, decoders.Sequence)
    assert_as_the_library("bpe", "\U0001f9ff\0\x7f")


def test_a_model_of_another_vocabulary_beside_the_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.copytree(folder("bpe"), tmp_path, dirs_exist_ok=True)
    config = SentencePieceTokenizer(kind="sentencepiece", vocab_size=1300)
    (tmp_path / SENTENCEPIECE_FILE).write_bytes(train_sentencepiece(config, texts()))
    with pytest.raises(DataError, match=r"sentencepiece.model: has 1300 pieces, and the tokenizer.json beside it 1200"):
        TokenIds.open(tmp_path)


def test_a_file_that_is_no_tokenizer_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_FILE).write_text('{"version": "1.0"')
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer \(.*; write the folder again") as caught:
        TokenIds.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_worker_processes_import_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write_corpus(tmp_path, documents=1)
    program = (
        "import sys; from dsllm.data.token_ids import TokenIds; "
        f"TokenIds.open({str(folder('bpe'))!r}).encode(['a']); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
