"""Bytes are those of the text that tokens stand for, whatever kind of vocabulary they are of."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dsllm.data.samples import IGNORED_LABEL
from dsllm.data.vocabulary import END_OF_TEXT, fast_tokenizer, train_bpe, train_sentencepiece
from dsllm.evaluation.text_bytes import TextBytes, text_bytes
from dsllm.spec.sections import BpeTokenizer, SentencePieceTokenizer
from tests.small_text import WORDS

TEXTS = [
    "badi fegu kali",
    "  leading and   inner spaces \n\ttabs\r\n",
    "naïve café — “quoted” 漢字 🙂 \u2581 \u0301",
    "<0x41> <unk> <|endoftext|> kali<|endoftext|>",
    "x",
    "e\u0301te\u0301",
]


def byte_level() -> Tokenizer:
    return train_bpe(BpeTokenizer(kind="bpe", vocab_size=500), [" ".join(WORDS)] * 8)


def byte_level_with_a_space_before() -> Tokenizer:
    """As GPT-2's with `add_prefix_space`, or RoBERTa's."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def byte_level_of_composed_characters() -> Tokenizer:
    """As Qwen's."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece(algorithm: str) -> Tokenizer:
    config = SentencePieceTokenizer(kind="sentencepiece", vocab_size=500, algorithm=algorithm)
    return fast_tokenizer(train_sentencepiece(config, [" ".join(WORDS)] * 8))


def llama_2() -> Tokenizer:
    """As its tokenizer.json has it: a mark for each space, which reads the mark itself as one too, another one put
    before the text, and bytes for what is unknown."""
    pieces = ["<unk>", "<s>", END_OF_TEXT, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "ka", "li", "a", "b"]
    vocabulary = {piece: token for token, piece in enumerate([*pieces, "k", "l", "i", "\u2581ka"])}
    merges = [("k", "a"), ("l", "i"), ("\u2581", "ka")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", END_OF_TEXT])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level,
    "byte-level, a space before": byte_level_with_a_space_before,
    "byte-level, normalised": byte_level_of_composed_characters,
    "sentencepiece bpe": lambda: sentencepiece("bpe"),
    "sentencepiece unigram": lambda: sentencepiece("unigram"),
    "as Llama 2": llama_2,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made = TOKENIZERS[request.param]()
    made.encode_special_tokens = True  # as preparation has it: no text forges an end
    return made


def stream_of(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, int]:
    """The texts as prepared tokens, end-of-text behind each and one before the first; and the id of end-of-text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [token for text in texts for token in (*tokenizer.encode(text, add_special_tokens=False).ids, end)]
    return np.array([end, *ids], dtype=np.int64), end


def num_bytes(tokenizer: Tokenizer, texts: list[str]) -> int:
    """Of the texts as the tokenizer reads them."""
    return sum(len(as_it_is_read(tokenizer, text).encode()) for text in texts)


def as_it_is_read(tokenizer: Tokenizer, text: str) -> str:
    if isinstance(tokenizer.normalizer, normalizers.NFC):
        return unicodedata.normalize("NFC", text)
    if getattr(tokenizer.pre_tokenizer, "add_prefix_space", False):
        return text.removeprefix(" ")  # for which the tokenizer puts none
    return text.replace("\u2581", " ") if tokenizer.normalizer is not None else text


def counter(tokenizer: Tokenizer, end: int) -> TextBytes:
    counted = text_bytes(tokenizer, end)
    assert counted is not None
    return counted


def test_all_tokens_of_documents_are_all_bytes_of_their_text(tokenizer: Tokenizer) -> None:
    for texts in (*([text] for text in TEXTS), TEXTS):
        stream, end = stream_of(tokenizer, texts)
        assert counter(tokenizer, end).of(stream[:-1], stream[1:]) == num_bytes(tokenizer, texts), texts


def test_sequences_that_end_inside_of_a_character_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    stream, end = stream_of(tokenizer, TEXTS)
    counted = counter(tokenizer, end)
    inputs, labels = stream[:-1], stream[1:]
    parts = [counted.of(inputs[start : start + 3], labels[start : start + 3]) for start in range(0, len(labels), 3)]
    assert sum(parts) == num_bytes(tokenizer, TEXTS)


def test_what_no_loss_counts_has_no_bytes(tokenizer: Tokenizer) -> None:
    stream, end = stream_of(tokenizer, TEXTS)
    inputs, labels = np.stack([stream[:-1]] * 2), np.stack([stream[1:]] * 2)
    labels[1] = IGNORED_LABEL
    counted = counter(tokenizer, end)
    assert counted.of(inputs, labels) == counted.of(inputs[:1], labels[:1])


def test_end_of_text_is_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert counter(tokenizer, end).of(np.array([end, end]), np.array([end, end])) == 0


def test_added_tokens_that_are_not_special_are_the_text_that_they_spell() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool é>"])
    stream, end = stream_of(tokenizer, ["badi <tool é> kali"])
    assert counter(tokenizer, end).of(stream[:-1], stream[1:]) == len("badi <tool é> kali".encode())


def test_a_vocabulary_whose_tokens_have_no_bytes_of_their_own_is_not_counted() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "ka": 1, "##li": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert text_bytes(tokenizer, 0) is None
    tokenizer.decoder = decoders.WordPiece()
    assert text_bytes(tokenizer, 0) is None


def test_spaces_before_every_piece_of_a_text_are_not_counted() -> None:
    tokenizer = byte_level()
    steps = [pre_tokenizers.Split("\t", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    assert text_bytes(tokenizer, 0) is None
