"""How many bytes of text tokens stand for, from the vocabulary alone.

Each token of a byte-level vocabulary (GPT-2, Llama 3, Qwen, dsllm's `bpe`) or of one with byte fallback (Llama 2,
Mistral, Gemma, dsllm's `sentencepiece`) is a fixed string of bytes, and those of a document, one behind the other, are
its text in UTF-8. So a sum over tokens is exact even where a sequence begins or ends inside of a character, which
decoding is not. Special tokens, end-of-text above all, stand for no text.

The text is that which the tokenizer reads: where it normalises first, as Qwen's does (NFC), the bytes are those of the
normalised text. Where it puts a space before a document that has none (GPT-2 with `add_prefix_space`), one that begins
with a space itself has the same tokens, and counts a byte less than it has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from dsllm.data.order import Integers
from dsllm.data.samples import IGNORED_LABEL

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORD_MARK = "\u2581"
"""Stands for a space in sentencepiece's usual vocabularies, where texts cannot have it; those of dsllm hold spaces."""

_SPACE_BYTE = "\u0120"
"""The character of a byte-level vocabulary that stands for a space."""


class TextBytes:
    """Counts the bytes of labels."""

    def __init__(self, lengths: Integers, end_of_text_id: int, begins_with_space: Integers | None = None) -> None:
        """`lengths` are bytes by token id. `begins_with_space`, likewise by id, is 1 where a token that begins a
        document stands for one byte less: the tokenizer has put a space there that is not in the text."""
        self._lengths = lengths
        self._end_of_text_id = end_of_text_id
        self._begins_with_space = begins_with_space

    def of(self, inputs: Integers, labels: Integers) -> int:
        """Bytes of the counted labels; `inputs` are the tokens before them, of the same shape."""
        counted = labels != IGNORED_LABEL
        total = int(self._lengths[labels[counted]].sum())
        if self._begins_with_space is not None:
            begins = counted & (inputs == self._end_of_text_id)
            total -= int(self._begins_with_space[labels[begins]].sum())
        return total


def text_bytes(tokenizer: Tokenizer, end_of_text_id: int) -> TextBytes | None:
    """What counts the bytes of this tokenizer's tokens; None for other kinds than those named above, whose tokens have
    no bytes of their own (WordPiece for one, which drops white space)."""
    description = json.loads(tokenizer.to_str())
    kinds = _kinds(description["decoder"])
    if kinds == ["ByteLevel"]:
        spaces = _spaces_put_before(description["pre_tokenizer"])
        if spaces == "pieces":
            return None
        lengths = _lengths(tokenizer, len)  # a character for each byte
        return TextBytes(lengths, end_of_text_id, _by_id(tokenizer, _begins_with_space_byte) if spaces else None)
    if "ByteFallback" in kinds and set(kinds) <= {"ByteFallback", "Fuse", "Replace", "Strip"}:
        lengths = _lengths(tokenizer, _marked_bytes if "Replace" in kinds else _fallback_bytes)
        return TextBytes(lengths, end_of_text_id, _by_id(tokenizer, _begins_with_space) if "Strip" in kinds else None)
    return None


def _kinds(decoder: dict[str, Any] | None) -> list[str]:
    """Names of the steps of a decoder, in order."""
    if decoder is None:
        return []
    return [step["type"] for step in decoder.get("decoders", [decoder])]


def _spaces_put_before(pre_tokenizer: dict[str, Any] | None) -> Literal["documents", "pieces"] | None:
    """Before what a byte-level tokenizer puts spaces that are not in the text: whole documents, or each piece that an
    earlier step has cut; nothing when None."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not any(step.get("add_prefix_space") for step in steps):
        return None
    return "documents" if steps[0].get("add_prefix_space") else "pieces"


def _lengths(tokenizer: Tokenizer, piece_bytes: Callable[[str], int]) -> Integers:
    """Bytes of every token by its id; 0 for special ones and for ids that are none."""
    lengths = _by_id(tokenizer, piece_bytes)
    for token, added in tokenizer.get_added_tokens_decoder().items():  # they stand in a text as they are
        lengths[token] = 0 if added.special else len(added.content.encode())
    return lengths


def _by_id(tokenizer: Tokenizer, number: Callable[[str], int]) -> Integers:
    """A number for each piece of the vocabulary, at its id."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    numbers = np.zeros(1 + max(vocabulary.values()), dtype=np.int64)
    for piece, token in vocabulary.items():
        numbers[token] = number(piece)
    return numbers


def _fallback_bytes(piece: str) -> int:
    return 1 if _BYTE.fullmatch(piece) else len(piece.encode())


def _marked_bytes(piece: str) -> int:
    return _fallback_bytes(piece.replace(_WORD_MARK, " "))


def _begins_with_space(piece: str) -> int:
    return int(piece.startswith(_WORD_MARK))


def _begins_with_space_byte(piece: str) -> int:
    return int(piece.startswith(_SPACE_BYTE))
