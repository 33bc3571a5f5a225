"""The network that is built is the one that the spec and the plan speak of."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dsllm.model.build import (
    build_model,
    compile_blocks,
    enable_activation_checkpointing,
    model_config,
    restore_rotary_tables,
)
from dsllm.model.initialize import initialize_weights
from dsllm.model.loss import TrainingModel
from dsllm.plan.model_shape import model_shape
from dsllm.spec.load import load_spec, preset_names

ALL_FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral")
FAMILIES = pytest.mark.parametrize("family", ALL_FAMILIES)
SMALL = "num_layers: 5, hidden_size: 64, num_attention_heads: 4, max_position_embeddings: 64"


@pytest.mark.parametrize("preset", preset_names())
def test_the_plan_counts_the_parameters_that_are_built(preset: str) -> None:
    spec = load_spec(preset)
    assert built_parameters(spec) == model_shape(spec).allocated_parameters


@pytest.mark.parametrize(
    ("preset", "overrides", "parameters"),
    [
        ("gpt2-124m", [], 124_439_808),
        ("1b", [], 1_065_758_400),
        ("1b", ["model.max_position_embeddings=512", "batch.sequence_length=512"], 1_064_939_200),
    ],
)
def test_published_sizes_are_met_to_the_parameter(preset: str, overrides: list[str], parameters: int) -> None:
    unpadded = load_spec(preset, [*overrides, "model.vocab_padding_multiple=1"])
    assert built_parameters(unpadded) == model_shape(unpadded).parameters == parameters


def test_lillms_shape_has_its_39_6_million_parameters() -> None:
    assert built_parameters(load_spec("lillm-39m")) == pytest.approx(39.6e6, abs=0.05e6)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.tie_word_embeddings=false"],
        ["model.num_key_value_heads=2", "model.intermediate_size=100"],
        ["model.vocab_size=4097"],
        ["model.vocab_size=4097", "model.vocab_padding_multiple=1"],
    ],
)
def test_the_plan_counts_what_overrides_build(overrides: list[str]) -> None:
    spec = load_spec("quickstart", overrides)
    assert built_parameters(spec) == model_shape(spec).allocated_parameters


def test_a_config_names_no_token_and_keeps_no_cache() -> None:
    config = model_config(load_spec("quickstart", [f"model={{family: gpt2, {SMALL}}}", "batch.sequence_length=64"]))
    assert config.bos_token_id is config.eos_token_id is None
    assert config.use_cache is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotary_tables_are_exact_whatever_the_weights_are_in(dtype: torch.dtype) -> None:
    model = small_model("llama", dtype)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert_exact(model.base_model.rotary_emb.inv_freq)


def test_rotary_tables_that_were_rounded_are_restored() -> None:
    model = small_model("llama")
    model.base_model.rotary_emb.inv_freq = model.base_model.rotary_emb.inv_freq.bfloat16()
    restore_rotary_tables(model)
    assert_exact(model.base_model.rotary_emb.inv_freq)


def test_rotary_tables_of_every_kind_of_layer_are_restored() -> None:
    sizes = "hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 64"
    kinds = "layer_types: [sliding_attention, full_attention]"
    spec = load_spec("quickstart", [f"model={{family: auto, config: {{model_type: olmo3, {sizes}, {kinds}}}}}"])
    model = build_model(model_config(spec), torch.float32)
    exact = {name: table.clone() for name, table in model.named_buffers()}
    rotary = model.base_model.rotary_emb
    for name, table in rotary.named_buffers():
        setattr(rotary, name, table.bfloat16())
    restore_rotary_tables(model)
    restored = dict(model.named_buffers())
    assert "model.rotary_emb.full_attention_inv_freq" in restored
    assert all(torch.equal(restored[name], table) for name, table in exact.items())


def test_sequences_of_the_full_length_run() -> None:
    ids = torch.randint(500, (1, 64), generator=torch.Generator().manual_seed(0))
    for family in ALL_FAMILIES:
        assert small_model(family)(input_ids=ids).logits.shape == (1, 64, 512)


@FAMILIES
@pytest.mark.parametrize(("every", "chosen"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])])
def test_activation_checkpointing_takes_every_nth_block_and_changes_no_bit(
    family: str, every: int, chosen: list[int]
) -> None:
    expected = loss_and_gradients(small_model(family))
    model = small_model(family)
    enable_activation_checkpointing(model, every)
    flags = [block.gradient_checkpointing for block in blocks_of(model)]
    assert [index for index, is_on in enumerate(flags) if is_on] == chosen
    found, saved = counting_saved_bytes(lambda: loss_and_gradients(model))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert saved < counting_saved_bytes(lambda: loss_and_gradients(small_model(family)))[1]


@FAMILIES
def test_fused_attention_equals_the_plain_one(family: str) -> None:
    fused, eager = (small_model(family, overrides=[f"model.attention={kind}"]) for kind in ("sdpa", "eager"))
    assert fused.config._attn_implementation == "sdpa"
    torch.testing.assert_close(loss_and_gradients(fused), loss_and_gradients(eager), atol=1e-5, rtol=1e-4)


@FAMILIES
def test_no_position_sees_a_later_token(family: str) -> None:
    model = small_model(family).eval()
    ids = torch.randint(500, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 500
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.slow
@FAMILIES
def test_compiled_blocks_compute_the_same(family: str) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and there is none")
    model = small_model(family)
    compile_blocks(model)
    torch.testing.assert_close(loss_and_gradients(model), loss_and_gradients(small_model(family)), atol=1e-5, rtol=1e-4)


def built_parameters(spec: object) -> int:
    """Elements of the parameters, tied ones counted once; nothing is allocated."""
    with torch.device("meta"):
        model = build_model(model_config(spec), torch.bfloat16)
    return sum(parameter.numel() for parameter in model.parameters())


def small_model(family: str, dtype: torch.dtype = torch.float32, overrides: list[str] | None = None) -> PreTrainedModel:
    spec = load_spec(
        "quickstart",
        [
            f"model={{family: {family}, {SMALL}}}",
            "tokenizer={kind: bpe, vocab_size: 500}",
            "batch.sequence_length=64",
            *(overrides or []),
        ],
    )
    model = build_model(model_config(spec), dtype)
    initialize_weights(model, spec.seed)
    return model


def blocks_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def loss_and_gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    """The loss of two sequences of 48 tokens, and the gradient of every parameter."""
    ids = torch.randint(500, (2, 49), generator=torch.Generator().manual_seed(0))
    training_model = TrainingModel(model, "chunked").train()
    loss = training_model(input_ids=ids[:, :-1], labels=ids[:, 1:].contiguous())
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in training_model.parameters())]


def counting_saved_bytes(work: Callable[[], list[torch.Tensor]]) -> tuple[list[torch.Tensor], int]:
    """What `work` returns, and the bytes that autograd saved for backward in it (recomputed ones included twice)."""
    saved = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = work()
    return result, saved


def assert_exact(table: torch.Tensor) -> None:
    """Frequencies of heads of width 16: 10000^(-2i/16)."""
    expected = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), expected, atol=0, rtol=1e-6)
