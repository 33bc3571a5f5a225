"""Text to token ids on one core, in bounded memory. Imports neither torch nor transformers.

Text repeats its words. Where a vocabulary's text can be cut into words that have the same ids alone as in the whole,
`tokenizers` encodes each word once and its ids are kept: two to six times as fast as to encode every word again, with
exactly the same ids. Unigram vocabularies are faster yet in sentencepiece itself; all others are encoded by
`tokenizers` as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models

from dsllm.data.shards import token_dtype
from dsllm.data.words import slices, slices_of_words, word_pattern
from dsllm.errors import DataError

SENTENCEPIECE_FILE = "sentencepiece.model"
TOKENIZER_FILE = "tokenizer.json"

Ids = npt.NDArray[np.unsignedinteger[Any]]

_SLICE_CHARACTERS = 2**20
_UNIGRAM_CHARACTERS = 2**14  # sentencepiece adds scores up as floats: so few are exact, see vocabulary.py
_KEPT_WORDS = 2**17  # about 25 MB
_KEPT_WORD_CHARACTERS = 64  # longer ones seldom come again


class TokenIds:
    """A tokenizer as preparation uses it: nothing is added and nothing is left out, and a text that spells a special
    token stays text, so that no document can forge the end of another."""

    def __init__(self, tokenizer: Tokenizer, sentencepiece_file: Path | None = None) -> None:
        """`sentencepiece_file` is the model that the tokenizer is the twin of."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._dtype = token_dtype(1 + max(tokenizer.get_vocab().values()))
        self._encode = _fastest(tokenizer, sentencepiece_file, self._dtype)

    @classmethod
    def open(cls, directory: Path | str) -> TokenIds:
        """The tokenizer of a Hugging Face folder. Raises DataError where there is none that can be read."""
        original = Path(directory) / SENTENCEPIECE_FILE
        return cls(read_tokenizer(directory), original if original.is_file() else None)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text without end-of-text: read-only, uint16 where that holds the vocabulary, else uint32.

        They are those that `tokenizers` gives, save that a text of more than 2**20 characters is encoded in slices
        (see `words.slices`), and a lone surrogate, which is no character, is read as U+FFFD.
        """
        return [
            np.frombuffer(b"".join(map(self._encode, slices(readable(text), _SLICE_CHARACTERS))), self._dtype)
            for text in texts
        ]


def read_tokenizer(directory: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, as the `tokenizers` library has it. Raises DataError."""
    file = Path(directory) / TOKENIZER_FILE
    if not file.is_file():
        raise DataError(f"{directory}: no {TOKENIZER_FILE} in it; prepare the data first (dsllm data prepare)")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises nothing more special
        raise DataError(
            f"{file}: not a tokenizer ({' '.join(str(error).split())}); write the folder again with save_pretrained"
        ) from error


def readable(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON can spell and UTF-8 cannot."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _fastest(tokenizer: Tokenizer, sentencepiece_file: Path | None, dtype: np.dtype[Any]) -> Callable[[str], bytes]:
    """A function from text to the bytes of its ids."""
    words = word_pattern(tokenizer)
    if words is None:
        return lambda text: _encode_all(tokenizer, [text], dtype)[0]
    if isinstance(tokenizer.model, models.Unigram) and sentencepiece_file is not None:
        original = SentencePieceProcessor(model_file=str(sentencepiece_file))
        return partial(_encode_unigram, original, words, dtype)
    return _Words(tokenizer, words, dtype).encode


def _encode_all(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype[Any]) -> list[bytes]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype).tobytes() for encoding in encodings]


def _encode_unigram(original: Any, words: re.Pattern[str], dtype: np.dtype[Any], text: str) -> bytes:
    parts = slices_of_words(text, words, _UNIGRAM_CHARACTERS)
    return b"".join(original.encode(part, out_type="numpy").astype(dtype).tobytes() for part in parts)


class _Words:
    """Encodes text word by word, and keeps the ids of words until they are too many."""

    def __init__(self, tokenizer: Tokenizer, words: re.Pattern[str], dtype: np.dtype[Any]) -> None:
        self._tokenizer = tokenizer
        self._words = words
        self._dtype = dtype
        self._kept: dict[str, bytes] = {}

    def encode(self, text: str) -> bytes:
        words = self._words.findall(text)
        if len(self._kept) > _KEPT_WORDS:
            self._kept.clear()
        new = list(set(words).difference(self._kept))
        self._kept.update(zip(new, _encode_all(self._tokenizer, new, self._dtype), strict=True))
        ids = b"".join(map(self._kept.__getitem__, words))
        for word in new:
            if len(word) > _KEPT_WORD_CHARACTERS:
                del self._kept[word]
        return ids
