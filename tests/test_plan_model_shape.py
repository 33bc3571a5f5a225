"""Parameter counts against published figures and hand arithmetic."""

from __future__ import annotations

import pytest

from dsllm.plan.model_shape import flops_per_token, intermediate_size, model_shape
from dsllm.spec.load import load_spec


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt2-124m", 124_439_808),  # as transformers counts openai-community/gpt2
        ("gpt2-350m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1558m", 1_557_611_200),
        ("lillm-39m", 39_596_544),
        ("llama-248m", 248_013_824),
        ("llama-1b", 1_100_048_384),  # TinyLlama
        ("llama-7b", 6_738_415_616),  # Llama and Llama 2 7B
    ],
)
def test_parameters_are_exact(preset: str, parameters: int) -> None:
    assert model_shape(load_spec(preset)).parameters == parameters


def test_positions_count() -> None:
    long, short = load_spec("1b"), load_spec("1b", ["model.max_position_embeddings=512", "batch.sequence_length=512"])
    assert model_shape(long).parameters == 1_065_758_400
    assert model_shape(long).parameters - model_shape(short).parameters == 512 * 1600


def test_padding_is_allocated_but_not_counted() -> None:
    shape = model_shape(load_spec("gpt2-124m"))
    assert shape.padded_vocab_size == 50_304
    assert shape.allocated_parameters - shape.parameters == (50_304 - 50_257) * 768


def test_untied_padding_is_allocated_twice() -> None:
    shape = model_shape(load_spec("gpt2-124m", ["model.tie_word_embeddings=false"]))
    assert shape.allocated_parameters - shape.parameters == 2 * (50_304 - 50_257) * 768


def test_a_gpt2_block_by_hand() -> None:
    # attention 768 x 2304 + 2304 and 768 x 768 + 768; feed-forward 768 x 3072 + 3072 and back + 768; two norms
    by_hand = (1_769_472 + 2_304) + (589_824 + 768) + (2_359_296 + 3_072) + (2_359_296 + 768) + 2 * 1_536
    assert model_shape(load_spec("gpt2-124m")).parameters_per_layer == by_hand


def test_default_feed_forward_widths() -> None:
    assert intermediate_size(load_spec("gpt2-124m").model) == 3072
    assert intermediate_size(load_spec("llama-7b", ["model.intermediate_size=null"]).model) == 11_008
    assert intermediate_size(load_spec("quickstart", ["model.intermediate_size=null"]).model) == 512


def test_flops_per_token_by_hand() -> None:
    assert flops_per_token(model_shape(load_spec("gpt2-124m")), 1024) == 6 * 124_439_808 + 12 * 12 * 768 * 1024
