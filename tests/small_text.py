"""Text that the data tests make for themselves: a corpus of small files, and specs that read it."""

from __future__ import annotations

import random
from pathlib import Path

from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
WORDS = ["".join(random.Random(index).choices(_SYLLABLES, k=2 + index % 3)) for index in range(300)]


def write_corpus(folder: Path, documents: int = 40, words: int = 120) -> Path:
    """A folder of text files that differ from each other and are the same in every call."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        source = random.Random(index)
        lines = [" ".join(source.choices(WORDS, k=12)) + f" {source.random()}" for _ in range(words // 12)]
        (folder / f"document-{index:03d}.txt").write_text("\n    ".join(lines) + "\n", encoding="utf-8")
    return folder


def text_spec(path: Path | str, *overrides: str, name: str = "small") -> Spec:
    """A spec that reads the text at `path` with a sentencepiece vocabulary of 400 tokens."""
    return load_spec(
        "quickstart",
        [
            f"name={name}",
            f"data.sources=[{{kind: text, path: '{path}'}}]",
            "data.validation_fraction=0.1",
            "tokenizer={kind: sentencepiece, vocab_size: 400}",
            *overrides,
        ],
    )
