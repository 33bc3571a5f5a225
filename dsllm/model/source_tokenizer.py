"""Which tokens an existing model knows, and whether a run's tokenizer gives them the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dsllm.errors import UserError, first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Without any of these transformers makes an empty tokenizer without a word."""


def tokens_by_id(folder: Path) -> dict[int, str] | None:
    """The vocabulary of the tokenizer in a model's folder; None where there is no tokenizer.

    Raises UserError for one that cannot be read.
    """
    remedy = "mend it, or take its files away to go on without comparing"
    tokenizer = folder_tokenizer(folder, remedy)
    return None if tokenizer is None else {number: token for token, number in tokenizer.get_vocab().items()}


def folder_tokenizer(folder: Path, remedy: str) -> Any | None:
    """The tokenizer in a model's folder; None where there is none. Raises UserError, with the `remedy`, for one that
    cannot be read."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds; a damaged tokenizer.json raises a bare Exception
        raise UserError(f"{folder}: its tokenizer cannot be read ({first_line(error)}); {remedy}") from error


def refuse_another_tokenizer(run: dict[int, str], source: dict[int, str], name: str) -> None:
    """Raises UserError, with the first token that differs, where the tokens `run` of a run are neither those of the
    model `name`, `source`, nor an extension of them: its embeddings would be of other tokens."""
    for number in sorted(source):
        if run.get(number) != source[number]:
            ours = f"is {run[number]!r}" if number in run else "does not exist"
            raise UserError(
                f"tokenizer: token {number} {ours}, and in {name}, which the model starts from, is {source[number]!r}; "
                f"set tokenizer to {{kind: pretrained, name: {name}}}, or to one that adds tokens to it"
            )
