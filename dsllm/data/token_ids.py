"""Text to token ids on one core, in bounded memory. Imports neither torch nor transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from dsllm.data.shards import TOKENIZER_FILE, token_dtype
from dsllm.errors import DataError, one_line

SENTENCEPIECE_FILE = "sentencepiece.model"

Ids = npt.NDArray[np.unsignedinteger[Any]]

_SLICE_CHARACTERS = 2**20
_SENTENCEPIECE_CHARACTERS = (
    2**14
)  # it adds scores up as floats: over so many characters they are exact, see vocabulary.py
_CUT_WINDOW_CHARACTERS = 2**16
_SPACE_AFTER_WORD = re.compile(r"(?<=\S) ")
_WHITE_AFTER_WORD = re.compile(r"(?<=\S)\s")


class TokenIds:
    """A tokenizer as preparation uses it: nothing is added and nothing is left out, and a text that spells a special
    token stays text, so that no document can forge the end of another."""

    def __init__(self, tokenizer: Tokenizer, sentencepiece_file: Path | None = None) -> None:
        """`sentencepiece_file` is the model that the tokenizer is the twin of: sentencepiece itself is faster."""
        num_tokens = 1 + max(tokenizer.get_vocab().values())
        self._dtype = token_dtype(num_tokens)
        if sentencepiece_file is None:
            self._most_characters, self._encode = _SLICE_CHARACTERS, _by_tokenizers(tokenizer)
        else:
            self._most_characters = _SENTENCEPIECE_CHARACTERS
            self._encode = _by_sentencepiece(sentencepiece_file, num_tokens)

    @classmethod
    def open(cls, directory: Path | str) -> TokenIds:
        """The tokenizer of a Hugging Face folder. Raises DataError where there is none that can be read."""
        original = Path(directory) / SENTENCEPIECE_FILE
        return cls(read_tokenizer(directory), original if original.is_file() else None)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text without end-of-text, uint16 where that holds the vocabulary, else uint32.

        A long text is encoded in slices (see `slices`), and a lone surrogate, which is no character, as U+FFFD.
        """
        parts = [list(slices(readable(text), self._most_characters)) for text in texts]
        ids = [np.asarray(part, self._dtype) for part in self._encode(list(chain.from_iterable(parts)))]
        bounds = accumulate(map(len, parts), initial=0)
        return [ids[first] if end - first == 1 else np.concatenate(ids[first:end]) for first, end in pairwise(bounds)]


def read_tokenizer(directory: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, as the `tokenizers` library has it. Raises DataError."""
    file = Path(directory) / TOKENIZER_FILE
    if not file.is_file():
        raise DataError(f"{directory}: no {TOKENIZER_FILE} in it; prepare the data first (dsllm data prepare)")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises nothing more special
        raise DataError(
            f"{file}: not a tokenizer ({one_line(error)}); write the folder again with save_pretrained"
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


def slices(text: str, characters: int) -> Iterator[str]:
    """The text in parts of so many characters at most.

    A part ends before the last space that follows other than white space, where nearly every vocabulary begins a new
    token, and each of vocabulary.py does; failing that before the last white space that does; failing that, anywhere.
    """
    start = 0
    while len(text) - start > characters:
        end = start + characters
        lowest = max(start + 1, end - _CUT_WINDOW_CHARACTERS)
        end = _last(_SPACE_AFTER_WORD, text, lowest, end) or _last(_WHITE_AFTER_WORD, text, lowest, end) or end
        yield text[start:end]
        start = end
    yield text[start:]


def _last(pattern: re.Pattern[str], text: str, lowest: int, highest: int) -> int | None:
    """The last place from `lowest` to `highest` where the pattern, of one character, matches."""
    return max((match.start() for match in pattern.finditer(text, lowest, highest + 1)), default=None)


def _by_tokenizers(tokenizer: Tokenizer) -> Callable[[list[str]], Iterator[list[int]]]:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return lambda texts: (item.ids for item in tokenizer.encode_batch_fast(texts, add_special_tokens=False))


def _by_sentencepiece(file: Path, num_tokens: int) -> Callable[[list[str]], Iterator[npt.NDArray[np.int32]]]:
    original: Any = SentencePieceProcessor(model_file=str(file))
    if original.get_piece_size() != num_tokens:
        raise DataError(
            f"{file}: has {original.get_piece_size()} pieces, and the {TOKENIZER_FILE} beside it {num_tokens} tokens; "
            f"one of the two is damaged: make the tokenizer again"
        )
    return lambda texts: (original.encode(text, out_type="numpy") for text in texts)
