"""Several validation sets, one number: what is held out counts with the mix, what is only validated on by its size."""

from __future__ import annotations

import pytest

from dsllm.data.shards import Manifest, SourceRecord, StreamRecord
from dsllm.evaluation.validation import combined_loss, mix_shares
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Data

LOSSES = {"news": 4.0, "code": 2.0, "wiki": 7.0}
TOKENS = {"news": 100.0, "code": 300.0, "wiki": 600.0}


def test_held_out_sets_count_with_the_mix_and_named_ones_not_at_all() -> None:
    assert combined_loss(LOSSES, TOKENS, {"news": 3.0, "code": 1.0}) == pytest.approx(0.75 * 4 + 0.25 * 2)


def test_where_nothing_is_held_out_named_sets_count_by_their_tokens() -> None:
    for shares in ({}, {"other": 1.0}, {"news": 0.0}):
        assert combined_loss(LOSSES, TOKENS, shares) == pytest.approx(0.1 * 4 + 0.3 * 2 + 0.6 * 7)


def test_one_set_is_the_number_itself() -> None:
    assert combined_loss({"news": 4.1}, {"news": 77.0}, {"news": 0.3}) == pytest.approx(4.1, rel=1e-15)


def test_a_source_without_weight_in_the_mix_is_reported_but_does_not_count() -> None:
    assert combined_loss(LOSSES, TOKENS, {"news": 1.0, "code": 0.0}) == 4.0


def test_shares_are_the_weights_where_there_are_any() -> None:
    assert mix_shares(data_of(weights=(0.51, 0.49)), manifest()) == {"news": 0.51, "code": 0.49}


def test_shares_are_the_tokens_to_train_on_where_there_are_no_weights() -> None:
    assert mix_shares(data_of(weights=None), manifest()) == {"news": 900, "code": 0}


def data_of(weights: tuple[float, float] | None) -> Data:
    first, second = (f", weight: {weight}" for weight in weights) if weights else ("", "")
    sources = f"[{{kind: text, path: news{first}}}, {{kind: text, path: code{second}}}]"
    return load_spec(
        "quickstart", [f"data={{sources: {sources}, validation_sources: [{{kind: text, path: wiki}}]}}"]
    ).data


def manifest() -> Manifest:
    """News to train and to validate on; all of the code was held out."""
    return Manifest(
        inputs={},
        dtype="uint16",
        vocab_size=500,
        end_of_text_id=0,
        tokenizer_sha256="",
        sources=(
            source("news", train=900, validation=100),
            source("code", validation=300),
            source("wiki", validation=600),
        ),
    )


def source(label: str, **tokens: int) -> SourceRecord:
    streams = {split: StreamRecord(tokens=number, documents=1, shards=()) for split, number in tokens.items()}
    return SourceRecord(label=label, source=label, documents=1, text_bytes=1, dropped={}, streams=streams)
