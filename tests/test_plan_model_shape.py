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


def test_a_qwen3_block_by_hand() -> None:
    shape = model_shape(load_spec("quickstart", [model("qwen3", "num_key_value_heads: 2, head_size: 32")]))
    # queries 64 x 128, keys and values 64 x 64, output 128 x 64; two norms of 32; three matrices of 64 x 256; two norms
    by_hand = 8_192 + 2 * 4_096 + 8_192 + 2 * 32 + 3 * 16_384 + 2 * 64
    assert shape.parameters_per_layer == by_hand


def test_a_mixtral_block_by_hand() -> None:
    shape = model_shape(load_spec("quickstart", [model("mixtral", "num_experts: 4, intermediate_size: 96")]))
    # attention; a router of 4 x 64; four experts of three matrices of 64 x 96; two norms
    assert shape.parameters_per_layer == 4 * 64**2 + 4 * 64 + 4 * 3 * 64 * 96 + 2 * 64
    assert shape.parameters - shape.active_parameters == 3 * 2 * 3 * 64 * 96  # of three layers, two experts each
    assert flops_per_token(shape, 128) == 6 * shape.active_parameters + 12 * 3 * 64 * 128


def test_mixtral_8x7b_has_its_published_parameters() -> None:
    config = {"model_type": "mixtral", "vocab_size": 32000}
    spec = load_spec("quickstart", [f"model={{family: auto, config: {config}, vocab_size: 32000}}"])
    shape = model_shape(spec)
    assert (shape.parameters, shape.active_parameters) == (46_702_792_704, 12_879_925_248)


def test_a_window_shortens_the_rows_that_are_counted() -> None:
    plain, windowed = (
        model_shape(load_spec("quickstart", [model("mistral", f"sliding_window: {window}")])) for window in ("null", 32)
    )
    assert flops_per_token(plain, 128) - flops_per_token(windowed, 128) == 12 * 3 * 64 * (128 - 32)


def model(family: str, more: str) -> str:
    return f"model={{family: {family}, num_layers: 3, hidden_size: 64, num_attention_heads: 4, {more}}}"


def test_flops_per_token_by_hand() -> None:
    assert flops_per_token(model_shape(load_spec("gpt2-124m")), 1024) == 6 * 124_439_808 + 12 * 12 * 768 * 1024
