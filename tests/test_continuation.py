"""Prompts continued together are continued as each would be alone, and as transformers does it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dsllm.model.continuation import choose_token, continue_prompts
from dsllm.model.loss import TrainingModel
from tests.speaking_models import VOCAB_SIZE, write_model

PROMPTS = [[5, 6, 7], [9], [100, 200, 300, 10, 20, 30, 40], [7] * 20]
NO_TOKEN = 511
"""Of the rows that pad the vocabulary."""
POSITIONS = 32


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_model(tmp_path_factory.mktemp("models") / "model", family=request.param, positions=POSITIONS)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


class Reader:
    """A forward for each token, and how many prompts each was given."""

    def __init__(self, model: Any) -> None:
        self.num_rows: list[int] = []
        self._model = model

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        self.num_rows.append(len(ids))
        return self._model(ids).logits[torch.arange(len(ids)), last, :VOCAB_SIZE]


def likeliest(logits: torch.Tensor, numbers: Sequence[int]) -> list[int]:
    return logits.argmax(dim=-1).tolist()


def go_on(reader: Reader, prompts: Sequence[Sequence[int]], **more: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 16, "num_positions": POSITIONS, "end_id": NO_TOKEN, "at_once": 8, **more}
    return continue_prompts(prompts, reader, likeliest, **settings)


@torch.no_grad()
def alone(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        suppress_tokens=list(range(VOCAB_SIZE, 512)),
    )
    return ids[0, len(prompt) :].tolist()


def test_prompts_of_several_lengths_go_on_as_transformers_continues_each(model: Any) -> None:
    expected = [alone(model, prompt, min(16, POSITIONS - len(prompt))) for prompt in PROMPTS]
    assert [len(tokens) for tokens in expected] == [16, 16, 16, 12]
    assert go_on(Reader(model), PROMPTS) == expected
    assert go_on(Reader(model), PROMPTS, at_once=3) == expected


def test_a_prompt_ends_by_itself_and_what_has_ended_is_not_read_again(model: Any) -> None:
    whole = go_on(Reader(model), PROMPTS)
    end = whole[0][3]
    reader = Reader(model)
    ended = go_on(reader, PROMPTS, end_id=end)
    assert ended == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in whole]
    num_forwards = [len(tokens) + (end in before) for tokens, before in zip(ended, whole, strict=True)]
    assert reader.num_rows == [sum(count > step for count in num_forwards) for step in range(max(num_forwards))]


def test_no_more_are_read_at_once_than_allowed(model: Any) -> None:
    reader = Reader(model)
    go_on(reader, PROMPTS, at_once=2)
    assert max(reader.num_rows) == 2


def test_a_model_without_positions_goes_on_as_long_as_asked(model: Any) -> None:
    assert [len(tokens) for tokens in go_on(Reader(model), [[5]], num_positions=None, max_new_tokens=20)] == [20]


def test_the_logits_of_one_place_are_those_of_all(model: Any) -> None:
    training = TrainingModel(copy.deepcopy(model), "plain")
    ids, last = torch.randint(VOCAB_SIZE, (3, 10)), torch.tensor([9, 0, 4])
    with torch.no_grad():
        assert torch.allclose(training(ids, logits_at=last), training(ids)[torch.arange(3), last], atol=1e-6)


# --- one token --------------------------------------------------------------------------------------------------------


def draws(logits: list[float], temperature: float, top_k: int, count: int = 2000) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    return Counter(choose_token(torch.tensor(logits), temperature, top_k, generator) for _ in range(count))


def test_tokens_are_drawn_as_their_logits_say() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().tolist()
    assert draws(logits, 1.0, 0)[2] / 2000 == pytest.approx(0.7, abs=0.04)
    assert draws(logits, 0.5, 0)[2] / 2000 == pytest.approx(0.49 / (0.01 + 0.04 + 0.49), abs=0.04)
    assert set(draws(logits, 1.0, 2)) == {1, 2}
    assert set(draws(logits, 5.0, 100)) == {0, 1, 2}
    assert draws(logits, 0.0, 0) == {2: 2000}


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_logits_that_are_no_numbers_give_some_token(temperature: float) -> None:
    assert set(draws([torch.nan] * 3, temperature, 2, count=10)) <= {0, 1, 2}
    assert set(draws([torch.nan, torch.inf, -torch.inf], temperature, 0, count=10)) == {1}


@pytest.mark.parametrize("temperature", [1e-6, 1e-42])
def test_next_to_temperature_0_the_likeliest_is_drawn_whatever_its_logit(temperature: float) -> None:
    assert draws([3.0, -1e4, 2.5], temperature, 0, count=20) == {0: 20}
    assert draws([-torch.inf, torch.inf, 0.0], temperature, 0, count=20) == {1: 20}


def test_at_an_infinite_temperature_all_tokens_are_as_likely() -> None:
    assert set(draws([-torch.inf, torch.inf, 0.0], float("inf"), 0, count=50)) == {0, 1, 2}
