"""What dsllm cannot train as it is, it says before it trains it; and other types start as transformers starts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from dsllm.errors import UserError
from dsllm.model.build import build_model
from dsllm.model.configs import auto_config
from dsllm.model.document_mask import sliding_window
from dsllm.model.initialize import initial_distribution, initialize_weights
from dsllm.model.narrow import narrow_model, narrowed
from dsllm.model.suitability import check_suitable

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def config_of(model_type: str, **keys: Any) -> PretrainedConfig:
    config = auto_config({"model_type": model_type, **keys})
    config._attn_implementation = "eager"
    return config


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_neox", "phi3", "olmo2", "gemma", "opt", "qwen3_moe"])
def test_many_types_can_be_trained_as_they_are(model_type: str) -> None:
    check_suitable(config_of(model_type), zero_stage=3, masks_documents=True)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("phi", "model type phi has no output projection, or one with a bias"),
        ("cohere", "model type cohere scales or caps its logits"),
        ("gemma2", "model type gemma2 scales or caps its logits"),
        ("gpt_oss", "model type gpt_oss draws model.layers.*.self_attn.sinks in a way of its own"),
        ("nemotron", "no model of type nemotron can be built of it"),
        ("gpt_neo", "model type gpt_neo cannot be shrunk to less than 268,435,456 parameters"),
    ],
)
def test_a_type_that_is_trained_in_another_way_is_refused_in_one_line(model_type: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        check_suitable(config_of(model_type), zero_stage=1, masks_documents=False)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_experts_in_a_loop_are_refused_at_stage_3_alone() -> None:
    config = config_of("mixtral")
    config._experts_implementation = "eager"
    check_suitable(config, zero_stage=2, masks_documents=False)
    with pytest.raises(UserError, match="its experts are computed one by one"):
        check_suitable(config, zero_stage=3, masks_documents=False)


def test_attention_that_takes_no_mask_of_documents_is_refused_where_there_are_some() -> None:
    config = config_of("bloom")
    check_suitable(config, zero_stage=1, masks_documents=False)
    with pytest.raises(UserError, match="its attention takes no mask of documents"):
        check_suitable(config, zero_stage=1, masks_documents=True)


def test_layers_of_several_kinds_take_no_mask_of_documents() -> None:
    mixed = config_of("olmo3", **SMALL, layer_types=["sliding_attention", "full_attention"])
    check_suitable(mixed, zero_stage=1, masks_documents=False)
    with pytest.raises(UserError, match=r"layers of several kinds \(full_attention, sliding_attention\)"):
        check_suitable(mixed, zero_stage=1, masks_documents=True)
    check_suitable(config_of("mistral", sliding_window=4096), zero_stage=1, masks_documents=True)


def test_a_window_that_no_layer_has_is_none() -> None:
    window = {"use_sliding_window": True, "sliding_window": 64}
    assert sliding_window(config_of("qwen2", **SMALL, **window, max_window_layers=2)) is None
    assert sliding_window(config_of("qwen2", **SMALL, **window, max_window_layers=0)) == 64
    assert sliding_window(config_of("mistral", sliding_window=64)) == 64


def test_looking_leaves_torchs_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    check_suitable(config_of("gpt_neox"), zero_stage=1, masks_documents=False)
    assert torch.equal(torch.get_rng_state(), expected)


def test_the_small_model_is_small_where_the_type_can_be_so() -> None:
    small = narrowed(config_of("llama", num_key_value_heads=8))
    assert (small.num_hidden_layers, small.hidden_size, small.num_key_value_heads) == (2, 64, 2)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt", "phi3"])
def test_nothing_is_dropped_out_of_the_small_model(model_type: str) -> None:
    model = narrow_model(config_of(model_type, attention_dropout=0.2)).train()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_small_model_has_experts_to_choose_among() -> None:
    assert narrowed(config_of("qwen3_moe", num_experts=64, num_experts_per_tok=8)).num_experts == 16
    assert narrowed(config_of("qwen3_moe", num_experts=3, num_experts_per_tok=2)).num_experts == 3


def test_a_type_with_two_sizes_of_a_head_can_be_small() -> None:
    small = narrow_model(config_of("deepseek_v3"))
    assert small.config.hidden_size == 64
    assert any(".experts." in name for name, _ in small.named_parameters())


def test_vectors_of_other_types_begin_as_transformers_has_them() -> None:
    # Gemma's norms add 1 to their weights, which therefore begin at 0
    config = config_of("gemma", **SMALL, num_key_value_heads=2, head_dim=16, vocab_size=512, pad_token_id=None)
    assert initial_distribution("model.layers.1.input_layernorm.weight", 1, config) == (0.0, 0.0)
    model = build_model(config, torch.float32)
    initialize_weights(model, seed=1)
    own = {name: weight for name, weight in narrow_model(config).named_parameters() if weight.ndim < 2}
    for name, weight in model.named_parameters():
        assert weight.ndim >= 2 or torch.equal(weight, torch.full_like(weight, own[name].flatten()[0].item())), name
