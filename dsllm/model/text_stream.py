"""Text from tokens that come one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A byte of sentencepiece's vocabularies, for characters that have no token."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What bytes decode to that make no character, or none yet."""


class TextStream:
    """What follows a context, given out piece by piece as soon as no later token can change it.

    The pieces, joined, are what all tokens together decode to behind the context, up to the first text of `stops`. Held
    back meanwhile: a character of which bytes are missing; a row of byte tokens, which one more can make invalid as a
    whole; and what may become a stop text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.text = ""
        """Given out so far."""
        self.num_tokens = 0
        self.is_finished = False
        """Whether a stop text came, or `finish` was called."""
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._stops = stops
        self._start = len(decode(tokenizer, self._ids))

    def push(self, token: int) -> str:
        """The piece that `token` settles, often none."""
        self._ids.append(token)
        self.num_tokens += 1
        text = self._decoded()
        stop = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=None)
        if stop is not None:
            self.is_finished = True
            return self._give_out(text[:stop])
        if text.endswith(REPLACEMENT) or self._settles_nothing(token):
            return ""
        return self._give_out(text[: len(text) - _beginning_of_a_stop(text, self._stops)])

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        self.is_finished = True
        return self._give_out(self._decoded())

    def _settles_nothing(self, token: int) -> bool:
        """A special token, which is no text, or a byte, behind which more may come."""
        is_byte = BYTE_TOKEN.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token)))
        return token in self._special_ids or is_byte is not None

    def _decoded(self) -> str:
        return decode(self._tokenizer, self._ids)[self._start :]

    def _give_out(self, text: str) -> str:
        piece = text[len(self.text) :]
        self.text += piece
        return piece


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens left out, every space as the model wrote it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _beginning_of_a_stop(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that a stop text begins with."""
    lengths = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return max(lengths, default=0)
