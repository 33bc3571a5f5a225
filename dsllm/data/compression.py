"""How well a tokenizer writes text that it was not trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dsllm.data.held_out import key_number
from dsllm.data.sources.catalogue import documents
from dsllm.data.sources.piece import Document
from dsllm.data.token_ids import TokenIds, read_tokenizer, readable
from dsllm.data.tokenizer import token_count
from dsllm.spec.sections import Data

MEASURED_BYTES = 10_000_000
"""Held-out text that a report is made of at most."""

SEARCHED_BYTES = 500_000_000
"""Text that is read at most to find it: of 10 billion tokens nobody waits for a report."""

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Compression:
    """What some documents came to."""

    documents: int
    text_bytes: int
    words: int
    """Stretches without white space."""
    tokens: int
    """End-of-text not counted."""
    fallback_tokens: int
    """Those that stand for less than a character, or for one that the vocabulary does not know."""
    vocab_size: int
    used_vocabulary: int
    """Tokens of the vocabulary that occur."""
    documents_returned: int
    """Documents that come back unchanged when their tokens are decoded."""

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / self.words

    @property
    def fallback_share(self) -> float:
        return self.fallback_tokens / self.tokens

    @property
    def used_share(self) -> float:
        return self.used_vocabulary / self.vocab_size


def measure_compression(directory: Path | str, texts: Iterable[str]) -> Compression | None:
    """Encode and decode the texts with the tokenizer of a folder; None where they come to no token at all.

    Raises DataError for a folder without a tokenizer.
    """
    tokenizer, token_ids = read_tokenizer(directory), TokenIds.open(directory)
    vocab_size = token_count(tokenizer)
    occurrences = np.zeros(vocab_size, np.int64)
    counts = np.zeros(4, np.int64)
    for text in map(readable, texts):
        (ids,) = token_ids.encode([text])
        occurrences += np.bincount(ids, minlength=vocab_size)
        is_returned = tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
        counts += (1, len(text.encode("utf-8")), len(text.split()), is_returned)
    num_documents, text_bytes, words, returned = counts.tolist()
    if not occurrences.any() or not words:
        return None
    return Compression(
        documents=num_documents,
        text_bytes=text_bytes,
        words=words,
        tokens=int(occurrences.sum()),
        fallback_tokens=int(occurrences[_fallback_ids(tokenizer)].sum()),
        vocab_size=vocab_size,
        used_vocabulary=int(np.count_nonzero(occurrences)),
        documents_returned=returned,
    )


def held_out_texts(
    data: Data, held_out_below: int, most_bytes: int = MEASURED_BYTES, *, skip_bad_lines: bool = False
) -> Iterator[str]:
    """Text of the validation sources, and that of the training sources whose `key_number` is below `held_out_below`:
    an equal share of `most_bytes` from each source, from its start."""
    sources = [(source, 2**64) for source in data.validation_sources]
    sources += [(source, held_out_below) for source in data.sources if held_out_below]
    for source, below in sources:
        opened = documents(source, skip_bad_lines=skip_bad_lines)
        yield from _held_out(opened, below, most_bytes // len(sources), SEARCHED_BYTES // len(sources))


def _held_out(opened: Iterable[Document], below: int, room_bytes: int, search_bytes: int) -> Iterator[str]:
    for document in opened:
        text = readable(document.text)
        search_bytes -= len(text)
        if key_number(document.key) < below:
            encoded = text.encode("utf-8")[:room_bytes]
            yield encoded.decode("utf-8", errors="ignore")  # the cut may fall inside a character
            room_bytes -= len(encoded)
        if room_bytes <= 0 or search_bytes <= 0:
            break


def _fallback_ids(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Ids of bytes that are no whole character, of sentencepiece's byte pieces, and of the unknown token."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    found = []
    for token, number in tokenizer.get_vocab().items():
        written = tokenizer.decode([number], skip_special_tokens=False)
        is_byte_piece = written != token and _BYTE_PIECE.fullmatch(token)
        if is_byte_piece or token == unknown or ("\ufffd" in written and "\ufffd" not in token):
            found.append(number)
    return np.array(found, np.int64)
