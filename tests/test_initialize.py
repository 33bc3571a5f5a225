"""Initial weights: the same bits for the same seed, with GPT-2's statistics."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from transformers import PreTrainedModel

from dsllm.model.build import build_model, model_config
from dsllm.model.initialize import RESIDUAL_PROJECTIONS, initialize_weights, parameter_seed
from dsllm.spec.load import load_spec

NUM_LAYERS = 4
FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral"])


@FAMILIES
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(family: str) -> None:
    first, again, other = (initialized(family, seed=seed) for seed in (1337, 1337, 1338))
    assert digests(first) == digests(again)
    matrices = {name for name, parameter in first.named_parameters() if parameter.ndim >= 2}
    same = {name for name, digest in digests(first).items() if digests(other)[name] == digest}
    assert same == names_of(first) - matrices, "vectors are constant, and every matrix differs"


@FAMILIES
def test_the_bits_depend_neither_on_torchs_own_random_state_nor_on_the_number_of_threads(family: str) -> None:
    expected = digests(initialized(family))
    threads = torch.get_num_threads()
    try:
        for seed, count in ((0, 1), (99, 2)):
            torch.manual_seed(seed)
            torch.set_num_threads(count)
            assert digests(initialized(family)) == expected
    finally:
        torch.set_num_threads(threads)


def test_initialisation_leaves_torchs_own_random_state_alone() -> None:
    model = build("gpt2")
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    initialize_weights(model, seed=5)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_parameter_is_drawn_by_its_name_whatever_else_the_model_has() -> None:
    # More layers come after and between nothing: what both models have is alike but for the residual scale.
    shallow, deep = initialized("llama", num_layers=2), dict(initialized("llama", num_layers=4).named_parameters())
    for name, parameter in shallow.named_parameters():
        if not name.endswith(RESIDUAL_PROJECTIONS):
            assert torch.equal(parameter, deep[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_the_rounded_fp32_bits(dtype: torch.dtype) -> None:
    half = dict(initialized("gpt2", dtype=dtype).named_parameters())
    for name, parameter in initialized("gpt2").named_parameters():
        assert torch.equal(half[name], parameter.to(dtype)), name


def test_the_bits_are_those_of_every_earlier_version() -> None:
    # A change here makes every run with an old seed another run: it belongs into the changelog.
    assert parameter_seed(1337, "transformer.wte.weight") == 2_970_097_235_876_146_537
    weight = initialized("gpt2").transformer.wte.weight
    torch.testing.assert_close(weight[0, :3], GOLDEN_WEIGHTS, atol=1e-7, rtol=1e-6)


GOLDEN_WEIGHTS = torch.tensor([0.0146880085, -0.0011990345, 0.0016219254])


@FAMILIES
def test_every_weight_has_the_deviation_that_gpt2_gives_it(family: str) -> None:
    std = 0.05
    for name, parameter in initialized(family, std=std).named_parameters():
        if parameter.ndim < 2:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
            continue
        expected = std / math.sqrt(2 * NUM_LAYERS) if name.endswith(RESIDUAL_PROJECTIONS) else std
        error = 5 / math.sqrt(parameter.numel())  # five standard errors
        assert float(parameter.std()) == pytest.approx(expected, rel=error), name
        assert abs(float(parameter.mean())) < error * expected, name


@FAMILIES
def test_two_matrices_of_each_block_write_to_the_residual_stream(family: str) -> None:
    names = [name for name in names_of(build(family)) if name.endswith(RESIDUAL_PROJECTIONS)]
    assert len(names) == 2 * NUM_LAYERS


@FAMILIES
def test_tied_weights_are_one_tensor_and_drawn_once(family: str) -> None:
    tied, untied = initialized(family), initialized(family, tied=False)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert torch.equal(tied.get_input_embeddings().weight, untied.get_input_embeddings().weight)
    assert not torch.equal(untied.get_output_embeddings().weight, untied.get_input_embeddings().weight)


@FAMILIES
def test_an_untrained_model_has_the_loss_of_ignorance(family: str) -> None:
    model = initialized(family, std=0.02)
    ids = torch.randint(500, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(math.log(model.config.vocab_size), abs=0.1)


def build(
    family: str, std: float = 0.02, num_layers: int = NUM_LAYERS, tied: bool = True, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    overrides = [
        f"model={{family: {family}, num_layers: {num_layers}, hidden_size: 64, num_attention_heads: 4}}",
        f"model.initializer_range={std}",
        f"model.tie_word_embeddings={str(tied).lower()}",
        "tokenizer={kind: bpe, vocab_size: 500}",
    ]
    return build_model(model_config(load_spec("quickstart", overrides)), dtype)


def initialized(family: str, seed: int = 1337, **shape: object) -> PreTrainedModel:
    model = build(family, **shape)
    initialize_weights(model, seed)
    return model


def digests(model: PreTrainedModel) -> dict[str, str]:
    """SHA-256 of the bits of every parameter, by its name."""
    return {
        name: hashlib.sha256(parameter.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }


def names_of(model: PreTrainedModel) -> set[str]:
    return {name for name, _ in model.named_parameters()}
