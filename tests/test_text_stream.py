"""Pieces of text, joined, are the text: whatever tokens come, in whatever vocabulary, and wherever it stops."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from dsllm.model.text_stream import TextStream, decode
from tests.speaking_models import VOCAB_SIZE, make_tokenizer

VOCABULARIES = ["bpe", "sentencepiece"]
CONTEXTS = ["", "def main(", "a line\n", "    indented ", "größe", "日本", "🦊", "e\u0301", "ends in a space "]
WRITTEN = ["):\n    return self", " naïve café 🦊🦊", "語のテキスト。", "\n\n\n", "\u200d👩\u200d👩\u200d👧", " "]


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return make_tokenizer(request.param)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def pieces_of(tokenizer: Any, context: Sequence[int], tokens: Sequence[int], *stops: str) -> list[str]:
    stream = TextStream(tokenizer, context, stops)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.is_finished:
            break
    else:
        pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return pieces


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("written", WRITTEN)
def test_pieces_join_to_the_text_behind_the_context(tokenizer: Any, context: str, written: str) -> None:
    pieces = pieces_of(tokenizer, ids_of(tokenizer, context), ids_of(tokenizer, written))
    assert "".join(pieces) == written


@pytest.mark.parametrize("context", ["", "def main(", "    indented "])
def test_pieces_of_tokens_that_make_no_sense_join_to_what_they_decode_to(tokenizer: Any, context: str) -> None:
    before = ids_of(tokenizer, context)
    for seed in range(200):
        tokens = random.Random(seed).choices(range(1, VOCAB_SIZE), k=24)
        assert "".join([context, *pieces_of(tokenizer, before, tokens)]) == decode(tokenizer, [*before, *tokens])


def test_text_is_given_out_with_the_token_that_settles_it(tokenizer: Any) -> None:
    tokens = ids_of(tokenizer, "return self.x")
    pieces = pieces_of(tokenizer, [], tokens)
    assert pieces[:-1] == [decode(tokenizer, [token]) for token in tokens]
    assert pieces[-1] == ""


def test_no_piece_holds_half_a_character(tokenizer: Any) -> None:
    tokens = ids_of(tokenizer, "x🐙y")  # an octopus that is in no vocabulary here: four bytes
    assert len(tokens) >= 6
    assert [piece for piece in pieces_of(tokenizer, [], tokens) if piece] in (["x", "🐙", "y"], ["x", "🐙y"])


@pytest.mark.parametrize(
    ("written", "stops", "expected"),
    [
        ("hello\nUser: hi", ["\nUser:"], "hello"),
        ("hello\nUse the fox", ["\nUser:"], "hello\nUse the fox"),
        ("hello\nUser", ["\nUser:"], "hello\nUser"),
        ("one two three", ["three", "two"], "one "),
        ("over the lazy dog", ["o"], ""),
        ("日本語のテキスト", ["テ"], "日本語の"),
    ],
)
def test_text_ends_before_the_first_stop_text(tokenizer: Any, written: str, stops: list[str], expected: str) -> None:
    assert "".join(pieces_of(tokenizer, [], ids_of(tokenizer, written), *stops)) == expected


def test_a_stop_text_in_the_context_stops_nothing(tokenizer: Any) -> None:
    assert "".join(pieces_of(tokenizer, ids_of(tokenizer, "a fox"), ids_of(tokenizer, " jumps"), "fox")) == " jumps"


def test_end_of_text_is_no_text(tokenizer: Any) -> None:
    assert "".join(pieces_of(tokenizer, [tokenizer.eos_token_id], ids_of(tokenizer, "  the"))) == "  the"
