"""Endings are scored as lm-evaluation-harness scores them: item by item, on two hundred items with every oddity."""

from __future__ import annotations

import collections
import importlib.metadata
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dsllm.data.hellaswag import Item, read_items
from dsllm.errors import DataError
from dsllm.evaluation import choices
from tests import hellaswag_rows

HARNESS_MISSING = "lm-evaluation-harness is not installed: pip install 'dsllm[harness]'"
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return hellaswag_rows.tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return hellaswag_rows.model(scale=0.3)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    return read_items(str(hellaswag_rows.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", all_rows())))


def all_rows() -> list[dict[str, Any]]:
    return hellaswag_rows.rows()


def ask(model: PreTrainedModel, encoded: list[choices.EncodedItem]) -> list[dict[str, Any]]:
    """What this code says of each item, in order, in the words of `hellaswag_rows.harness_answers`."""
    dealt = choices.deal(choices.batches(encoded, model.config.vocab_size, 4), rank=0, world_size=1)
    answers = choices.answer(lambda ids: model(ids).logits, dealt, DEVICE)
    order = np.argsort(answers.numbers)
    columns = answers.log_likelihoods[order], answers.is_right[order], answers.is_right_normalized[order]
    return [
        {"log_likelihoods": likelihoods.tolist(), "acc": float(acc), "acc_norm": float(acc_norm)}
        for likelihoods, acc, acc_norm in zip(*columns, strict=True)
    ]


def assert_alike(own: list[dict[str, Any]], others: list[dict[str, Any]], tolerance: float) -> None:
    assert len(own) == len(others) == hellaswag_rows.NUM_ROWS
    for mine, theirs in zip(own, others, strict=True):
        assert mine["log_likelihoods"] == pytest.approx(theirs["log_likelihoods"], abs=tolerance)
        assert (mine["acc"], mine["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])


def test_every_item_has_the_likelihoods_and_answers_that_the_harness_once_gave(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: list[Item]
) -> None:
    golden = json.loads(hellaswag_rows.GOLDEN.read_text())["items"]
    own = ask(model, choices.encode(items, tokenizer, hellaswag_rows.POSITIONS))
    assert_alike(own, golden, tolerance=2e-3)
    assert any(answer["acc"] != answer["acc_norm"] for answer in own), "the two scores are not told apart"


def test_every_item_has_the_likelihoods_and_answers_that_the_harness_gives(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: list[Item]
) -> None:
    pytest.importorskip("lm_eval", reason=HARNESS_MISSING)
    others = hellaswag_rows.harness_answers(model, tokenizer, all_rows())
    assert_alike(ask(model, choices.encode(items, tokenizer, hellaswag_rows.POSITIONS)), others, tolerance=1e-3)
    written = json.loads(hellaswag_rows.GOLDEN.read_text())
    if written["lm_eval"] == importlib.metadata.version("lm_eval"):
        assert_alike(written["items"], others, tolerance=2e-3)


def test_the_items_hold_every_oddity_of_the_real_ones(tokenizer: PreTrainedTokenizerFast, items: list[Item]) -> None:
    encoded = choices.encode(items, tokenizer, hellaswag_rows.POSITIONS)
    assert any(item.context.endswith(" ") for item in items), "white space between context and ending"
    assert any(not item.context.isascii() for item in items)
    assert any("" in item.endings for item in items), "endings that are nothing but brackets"
    assert any(len(row) == hellaswag_rows.POSITIONS + 1 for item in encoded for row, _ in item.rows), "cut contexts"
    assert {type(row["label"]) for row in all_rows()} == {int, str}


@pytest.mark.parametrize("normalized", [False, True])
def test_a_model_without_preferences_is_right_once_in_four(
    tokenizer: PreTrainedTokenizerFast, items: list[Item], normalized: bool
) -> None:
    uniform, score = hellaswag_rows.model(scale=0.0), "acc_norm" if normalized else "acc"
    own = ask(uniform, choices.encode(items, tokenizer, hellaswag_rows.POSITIONS))
    counts = collections.Counter(item.label for item in items)
    assert all(40 <= counts[label] <= 60 for label in range(4)), "unbalanced labels would prove nothing"
    assert sum(answer[score] for answer in own) / len(own) == pytest.approx(0.25, abs=0.08)
    # Whatever it answers: where each ending in turn is called the true one, exactly one is right.
    every_label = [item._replace(label=label) for item in items[:50] for label in range(4)]
    own = ask(uniform, choices.encode(every_label, tokenizer, hellaswag_rows.POSITIONS))
    assert sum(answer[score] for answer in own) == len(every_label) / 4


def test_equal_endings_are_equally_likely_wherever_they_stand_and_the_first_is_taken(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    same = Item("here", "bada: fefi gogu", ("kali mo", "kali mo", "kali mo", "kali mo"), label=0)
    (answer,) = ask(model, choices.encode([same], tokenizer, hellaswag_rows.POSITIONS))
    assert len(set(answer["log_likelihoods"])) == 1
    assert (answer["acc"], answer["acc_norm"]) == (1.0, 1.0)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_together_answer_as_one_rank_does_in_as_many_forwards_each(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: list[Item], world_size: int
) -> None:
    encoded = choices.encode(items[:40], tokenizer, hellaswag_rows.POSITIONS)
    cut = choices.batches(encoded, vocab_size=100_000, logit_bytes=4)
    assert len(cut) > world_size
    shares = [choices.deal(cut, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    told = [choices.answer(lambda ids: model(ids).logits, share, DEVICE) for share in shares]
    alone = choices.answer(lambda ids: model(ids).logits, choices.deal(cut, 0, 1), DEVICE)
    numbers = np.concatenate([answers.numbers for answers in told])
    assert sorted(numbers) == list(range(40))
    together = np.concatenate([answers.log_likelihoods for answers in told])[np.argsort(numbers)]
    assert np.array_equal(together, alone.log_likelihoods[np.argsort(alone.numbers)])


def test_a_rank_without_a_batch_of_its_own_answers_nothing_that_counts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: list[Item]
) -> None:
    cut = choices.batches(choices.encode(items[:1], tokenizer, hellaswag_rows.POSITIONS), 640, 4)
    (dealt,) = choices.deal(cut, rank=3, world_size=4)
    answers = choices.answer(lambda ids: model(ids).logits, [dealt], DEVICE)
    assert (len(answers.numbers), answers.is_right.sum()) == (0, 0)


def test_a_batch_has_no_more_logits_than_it_may(tokenizer: PreTrainedTokenizerFast, items: list[Item]) -> None:
    encoded = choices.encode(items, tokenizer, hellaswag_rows.POSITIONS)
    for batch in choices.batches(encoded, vocab_size=50_304, logit_bytes=2):
        inputs, labels = choices.rows_of(batch)
        assert inputs.shape == labels.shape == (4 * len(batch), batch[0].length)
        assert len(batch) == 1 or inputs.numel() * 50_304 * 2 <= choices.LOGITS_BYTES
        assert inputs.shape[1] <= hellaswag_rows.POSITIONS


def test_an_ending_longer_than_the_model_reads_names_its_item(tokenizer: PreTrainedTokenizerFast) -> None:
    item = Item("rows.jsonl, line 7", "bada: fefi", ("kali", "gogu " * 40, "mo", "ne"), label=0)
    expected = "rows.jsonl, line 7: ending 2 is 80 tokens; the model reads 32 at most; leave the item out, or take"
    with pytest.raises(DataError, match=re.escape(expected).replace("80", r"\d+")):
        choices.encode([item], tokenizer, 32)


def test_the_standard_error_is_that_of_a_mean_of_zeros_and_ones() -> None:
    score = choices.score(30, 50, 100)
    assert (score.acc, score.acc_norm, score.items) == (0.3, 0.5, 100)
    sample = np.array([1.0] * 30 + [0.0] * 70)
    assert score.standard_error(score.acc) == pytest.approx(sample.std(ddof=1) / np.sqrt(100))
