"""Tokenizers: the same ids as sentencepiece, every text back as it was, and the limits they must keep."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from small_text import text_spec, write_corpus
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsllm.data.held_out import key_number
from dsllm.data.sources.catalogue import documents
from dsllm.data.token_ids import SENTENCEPIECE_FILE, TOKENIZER_FILE, TokenIds
from dsllm.data.tokenizer import build_tokenizer, load_tokenizer, train_tokenizer, training_texts
from dsllm.data.vocabulary import END_OF_TEXT, fast_tokenizer, train_bpe, train_sentencepiece
from dsllm.errors import DataError, UserError
from dsllm.spec.sections import BpeTokenizer, JsonlSource, PythonStdlibSource, SentencePieceTokenizer, TextSource

STDLIB = PythonStdlibSource(kind="python-stdlib")
ALGORITHMS = ("bpe", "unigram")
AWKWARD_TEXTS = [
    "",
    " ",
    "\n\n\t  x\r\n",
    "    return  {'a':   1}  # trailing  ",
    "-" * 79 + "\n" + "=" * 79,
    " " * 77 + "x",
    "\u2581 is sentencepiece's own space",
    f"a text that spells {END_OF_TEXT}, <unk> and <0x41>",
    "naïve café 中文 🙂 \0 \u2585 \ufeff",
]


@cache
def sentencepiece_model(algorithm: str) -> bytes:
    config = SentencePieceTokenizer(kind="sentencepiece", vocab_size=1024, algorithm=algorithm)
    return train_sentencepiece(config, list(training_texts([STDLIB], 300_000)))


@cache
def twins(algorithm: str) -> tuple[sentencepiece.SentencePieceProcessor, Tokenizer]:
    """The sentencepiece model, and its `tokenizers` twin as preparation uses it: special tokens are text."""
    model = sentencepiece_model(algorithm)
    twin = fast_tokenizer(model)
    twin.encode_special_tokens = True
    return sentencepiece.SentencePieceProcessor(model_proto=model), twin


def assert_twins_agree(algorithm: str, text: str) -> None:
    original, twin = twins(algorithm)
    ids = twin.encode(text, add_special_tokens=False).ids
    assert ids == original.encode(text)
    assert twin.decode(ids, skip_special_tokens=False) == text
    assert original.decode(ids) == text


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ids_equal_those_of_sentencepiece_over_python_source(algorithm: str) -> None:
    for document in list(documents(STDLIB))[::8]:
        assert_twins_agree(algorithm, document.text)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_ids_equal_those_of_sentencepiece_over_awkward_text(algorithm: str, text: str) -> None:
    assert_twins_agree(algorithm, text)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=200))
def test_ids_equal_those_of_sentencepiece_over_any_unicode(algorithm: str, text: str) -> None:
    assert_twins_agree(algorithm, text)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 12))
def test_ids_equal_those_of_sentencepiece_over_joined_pieces(algorithm: str, seed: int, count: int) -> None:
    original, _ = twins(algorithm)
    pieces = random.Random(seed).choices(range(original.vocab_size()), k=count)
    assert_twins_agree(algorithm, "".join(map(original.id_to_piece, pieces)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_twice_gives_the_same_bytes(algorithm: str) -> None:
    assert sentencepiece_model.__wrapped__(algorithm) == sentencepiece_model(algorithm)


def test_digits_stand_alone() -> None:
    original, twin = twins("bpe")
    assert [original.id_to_piece(index) for index in twin.encode("2024").ids] == list("2024")


@cache
def byte_level() -> Tokenizer:
    return train_bpe(BpeTokenizer(kind="bpe", vocab_size=600), training_texts([STDLIB], 200_000))


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=200))
def test_byte_level_bpe_returns_any_text(text: str) -> None:
    ids = byte_level().encode(text, add_special_tokens=False).ids
    assert byte_level().decode(ids, skip_special_tokens=False) == text


def test_byte_level_bpe_trains_to_the_same_bytes() -> None:
    assert byte_level.__wrapped__().to_str() == byte_level().to_str()


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_the_saved_folder_loads_with_plain_transformers(tmp_path: Path, kind: str) -> None:
    spec = text_spec(write_corpus(tmp_path / "corpus"), f"tokenizer={{kind: {kind}, vocab_size: 400}}")
    built = build_tokenizer(spec, tmp_path / "tokenizer")
    text = "def  f(x):\n\n\treturn x ,  'é' !\r\n"
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), load_tokenizer(tmp_path / "tokenizer")):
        assert tokenizer.is_fast
        assert len(tokenizer) == 400
        assert tokenizer.encode(text) == built.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.eos_token == END_OF_TEXT
        assert tokenizer.encode(END_OF_TEXT) == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "settings", ["kind: sentencepiece, algorithm: bpe", "kind: sentencepiece, algorithm: unigram", "kind: bpe"]
)
def test_the_saved_folder_gives_the_ids_that_preparation_takes(tmp_path: Path, settings: str) -> None:
    spec = text_spec(write_corpus(tmp_path / "corpus"), f"tokenizer={{{settings}, vocab_size: 400}}")
    build_tokenizer(spec, tmp_path / "tokenizer")
    texts = [*AWKWARD_TEXTS, Path(__file__).read_text(encoding="utf-8")]
    plain = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", split_special_tokens=True)
    ids = [ids.tolist() for ids in TokenIds.open(tmp_path / "tokenizer").encode(texts)]
    assert ids == [plain.encode(text, add_special_tokens=False) for text in texts]
    assert [plain.decode(part) for part in ids] == texts


def test_the_saved_folder_agrees_with_the_sentencepiece_file_beside_it(tmp_path: Path) -> None:
    build_tokenizer(text_spec(write_corpus(tmp_path / "corpus")), tmp_path / "tokenizer")
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer" / SENTENCEPIECE_FILE))
    text = Path(__file__).read_text(encoding="utf-8").replace(END_OF_TEXT, "")
    assert load_tokenizer(tmp_path / "tokenizer").encode(text) == original.encode(text)


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_too_little_text_for_the_vocabulary_says_how_much_it_allows(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("hello world\n" * 3)
    spec = text_spec(tmp_path / "a.txt", f"tokenizer={{kind: {kind}, vocab_size: 4000}}")
    with pytest.raises(DataError, match=r"vocab_size: given 4000; the text is too short for more than 2\d\d tokens"):
        build_tokenizer(spec, tmp_path / "tokenizer")


def test_more_characters_than_the_vocabulary_says_how_many_it_needs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 200))) * 3, encoding="utf-8")
    with pytest.raises(DataError, match="given 400; the text's common characters alone need 458 tokens; raise it"):
        build_tokenizer(text_spec(tmp_path / "a.txt"), tmp_path / "tokenizer")


def test_training_text_is_bounded_and_shared_out_equally_whatever_the_weights(tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 1000)
    for weights in ((3.0, 1.0), (None, None), (1.0, 0.0)):
        sources = [
            TextSource(kind="text", path=str(tmp_path / f"{letter}.txt"), weight=weight)
            for letter, weight in zip("ab", weights, strict=True)
        ]
        assert "".join(training_texts(sources, 400)) == "a" * 200 + "b" * 200


def test_held_out_documents_and_validation_sources_are_not_trained_on(tmp_path: Path) -> None:
    corpus = TextSource(kind="text", path=str(write_corpus(tmp_path / "corpus")))
    every = list(documents(corpus))
    below = sorted(key_number(document.key) for document in every)[10]
    texts = list(training_texts([corpus], 10**9, below))
    assert texts == [document.text for document in every if key_number(document.key) >= below]
    assert len(texts) == len(every) - 10
    (tmp_path / "other.txt").write_text("QXZ " * 5000)
    alone = text_spec(tmp_path / "corpus")
    beside = text_spec(
        tmp_path / "corpus", f"data.validation_sources=[{{kind: text, path: '{tmp_path / 'other.txt'}'}}]"
    )
    for name, spec in (("alone", alone), ("beside", beside)):
        build_tokenizer(spec, tmp_path / name, held_out_below=below)
    assert (tmp_path / "alone" / TOKENIZER_FILE).read_bytes() == (tmp_path / "beside" / TOKENIZER_FILE).read_bytes()


def test_what_is_held_out_does_not_shape_the_vocabulary(tmp_path: Path) -> None:
    spec = text_spec(write_corpus(tmp_path / "corpus"))
    build_tokenizer(spec, tmp_path / "all")
    build_tokenizer(spec, tmp_path / "half", held_out_below=2**63)
    assert (tmp_path / "all" / TOKENIZER_FILE).read_bytes() != (tmp_path / "half" / TOKENIZER_FILE).read_bytes()


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_no_text_left_to_train_on_says_why(tmp_path: Path, kind: str) -> None:
    spec = text_spec(write_corpus(tmp_path / "corpus"), f"tokenizer={{kind: {kind}, vocab_size: 400}}")
    with pytest.raises(DataError, match="there is no text to train it on; give more text, or hold less of it out"):
        build_tokenizer(spec, tmp_path / "tokenizer", held_out_below=2**64)


def test_a_lone_surrogate_in_the_training_text_is_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    source = JsonlSource(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    assert list(training_texts([source], 1000)) == ["a \ufffd b"]


def pretrained(folder: Path, **special_tokens: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), **special_tokens).save_pretrained(folder)
    return folder


def test_a_tokenizer_larger_than_the_models_vocabulary_prints_both_numbers(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "pretrained", eos_token=END_OF_TEXT)
    spec = text_spec(tmp_path, f"tokenizer={{kind: pretrained, name: '{folder}'}}", "model.vocab_size=512")
    with pytest.raises(UserError, match="the tokenizer has 600 tokens and the model is built for 512; set"):
        build_tokenizer(spec, tmp_path / "tokenizer")


def test_a_pretrained_tokenizer_keeps_its_ids(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "pretrained", eos_token=END_OF_TEXT)
    spec = text_spec(tmp_path, f"tokenizer={{kind: pretrained, name: '{folder}'}}", "model.vocab_size=600")
    build_tokenizer(spec, tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").encode("def f(): pass") == byte_level().encode("def f(): pass").ids


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "pretrained")
    spec = text_spec(tmp_path, f"tokenizer={{kind: pretrained, name: '{folder}'}}", "model.vocab_size=600")
    with pytest.raises(DataError, match=r"it has no end-of-text token \(eos_token\)"):
        build_tokenizer(spec, tmp_path / "tokenizer")


def test_a_pretrained_name_that_cannot_be_had_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    spec = text_spec(tmp_path, "tokenizer={kind: pretrained, name: nobody/no-such}", "model.vocab_size=600")
    with pytest.raises(DataError, match=r"given 'nobody/no-such'; it cannot be loaded .*save_pretrained") as caught:
        build_tokenizer(spec, tmp_path / "tokenizer")
    assert "check the name and the network, or set it to a local folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_without_a_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    spec = text_spec(tmp_path, f"tokenizer={{kind: pretrained, name: '{tmp_path / 'no'}'}}", "model.vocab_size=600")
    with pytest.raises(DataError, match="/no'; there is no such folder; correct the path"):
        build_tokenizer(spec, tmp_path / "tokenizer")


def test_a_folder_below_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained(tmp_path / "pretrained", eos_token=END_OF_TEXT)
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = text_spec(tmp_path, "tokenizer={kind: pretrained, name: ~/pretrained}", "model.vocab_size=600")
    assert build_tokenizer(spec, tmp_path / "tokenizer").eos_token == END_OF_TEXT


def test_a_damaged_pretrained_folder_is_one_line(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "pretrained", eos_token=END_OF_TEXT)
    (folder / TOKENIZER_FILE).write_text('{"version": "1.0"}')
    spec = text_spec(tmp_path, f"tokenizer={{kind: pretrained, name: '{folder}'}}", "model.vocab_size=600")
    with pytest.raises(DataError, match=r"pretrained'; it cannot be loaded \(") as caught:
        build_tokenizer(spec, tmp_path / "tokenizer")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_reads_end_of_text_out_of_plain_text_is_refused(tmp_path: Path) -> None:
    model = models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("<", -2.0), ("/", -2.0)], unk_id=0)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>").save_pretrained(tmp_path / "forged")
    spec = text_spec(tmp_path, f"tokenizer={{kind: pretrained, name: '{tmp_path / 'forged'}'}}", "model.vocab_size=600")
    with pytest.raises(DataError, match="reads its end-of-text token '</s>' out of plain text"):
        build_tokenizer(spec, tmp_path / "tokenizer")


def test_loading_from_a_folder_without_a_tokenizer_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json in it; prepare the data first"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_is_trained_into_a_folder_whole_and_found_again(tmp_path: Path) -> None:
    spec = text_spec(write_corpus(tmp_path / "corpus"))
    out = tmp_path / "tokenizers" / "small"
    assert train_tokenizer(spec, out, 0) == train_tokenizer(spec, out, 0) == 400
    assert [path.name for path in out.parent.iterdir()] == ["small"]
    assert load_tokenizer(out).eos_token == END_OF_TEXT


def test_a_folder_with_another_tokenizer_is_left_as_it_is(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    train_tokenizer(text_spec(corpus), tmp_path / "out", 0)
    before = (tmp_path / "out" / TOKENIZER_FILE).read_bytes()
    with pytest.raises(
        UserError, match="out: holds another tokenizer; delete the folder, or choose another with --out"
    ):
        train_tokenizer(text_spec(corpus, "tokenizer.vocab_size=410"), tmp_path / "out", 0)
    assert (tmp_path / "out" / TOKENIZER_FILE).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_a_training_that_fails_leaves_nothing(tmp_path: Path) -> None:
    spec = text_spec(write_corpus(tmp_path / "corpus"), "tokenizer.vocab_size=400000")
    with pytest.raises(DataError, match="the text is too short"):
        train_tokenizer(spec, tmp_path / "tokenizers" / "small", 0)
    assert list((tmp_path / "tokenizers").iterdir()) == []
