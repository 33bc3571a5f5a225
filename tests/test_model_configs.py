"""A network by a configuration of transformers: from a folder or written out, with its mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from transformers import AutoConfig, GPTNeoXConfig, LlamaConfig, MixtralConfig

from dsllm.errors import SpecError, UserError
from dsllm.model.build import build_model, model_config
from dsllm.model.configs import auto_config, with_written_config
from dsllm.model.shapes import shape_of
from dsllm.model.trace import trace
from dsllm.plan.activations import activations
from dsllm.plan.model_shape import has_formula, model_shape
from dsllm.plan.workload import workload
from dsllm.spec.config_keys import DEFAULTS
from dsllm.spec.derived import dropout
from dsllm.spec.load import dump_spec, load_spec, parse_spec
from dsllm.spec.sections import Spec
from dsllm.spec.yaml_text import parse_yaml
from tests.spec_strategies import specs
from tests.test_layers import WITHOUT_HEAVY_MODULES

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
}
EXPERTS = {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4}
NEOX = {"model_type": "gpt_neox", **SMALL}


def spec_of(config: object, *overrides: str) -> Spec:
    text = json.dumps(config) if isinstance(config, dict) else config
    network = f"model={{family: auto, config: {text}, vocab_padding_multiple: 1}}"
    return load_spec("quickstart", [network, "tokenizer={kind: bpe, vocab_size: 500}", *overrides])


# --- sizes ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(spec=specs)
def test_every_tensor_of_every_family_is_foretold(spec: Spec) -> None:
    shallow = spec.model_copy(update={"model": spec.model.model_copy(update={"num_layers": 2, "vocab_size": 300})})
    with torch.device("meta"):
        built = build_model(model_config(shallow), torch.bfloat16)
    found = [(weight.numel(), weight.ndim >= 2) for weight in built.parameters()]
    assert [(tensor.elements, tensor.is_matrix) for tensor in model_shape(shallow).tensors] == found


@pytest.mark.parametrize("model_type", list(DEFAULTS))
def test_a_bare_configuration_has_the_sizes_that_transformers_gives_it(model_type: str) -> None:
    bare = AutoConfig.for_model(model_type)
    spec = spec_of({"model_type": model_type, "vocab_size": bare.vocab_size}, f"model.vocab_size={bare.vocab_size}")
    with torch.device("meta"):
        built = build_model(auto_config({"model_type": model_type}), torch.bfloat16)
    assert model_shape(spec).parameters == sum(weight.numel() for weight in built.parameters())


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "gpt2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"model_type": "mixtral", **SMALL, "num_key_value_heads": 2, "num_experts": 4},
    ],
)
def test_sizes_by_transformers_common_names_are_counted(keys: dict[str, object]) -> None:
    spec = spec_of(keys)
    with torch.device("meta"):
        built = build_model(model_config(spec), torch.bfloat16)
    assert has_formula(spec)
    assert shape_of(spec).parameters == sum(weight.numel() for weight in built.parameters())


def test_a_type_without_a_formula_is_built_without_memory() -> None:
    spec = spec_of(NEOX)
    assert not has_formula(spec)
    shape = shape_of(spec)
    assert shape.family == "gpt_neox"
    assert shape.parameters == sum(
        weight.numel() for weight in build_model(model_config(spec), torch.float32).parameters()
    )


def test_rows_that_pad_the_vocabulary_are_allocated_but_not_counted() -> None:
    padded = spec_of(NEOX, "model.vocab_padding_multiple=128")
    assert shape_of(padded).allocated_parameters - shape_of(spec_of(NEOX)).parameters == 2 * 12 * 64
    assert shape_of(padded).parameters == shape_of(spec_of(NEOX)).parameters


def test_a_traced_mixture_counts_what_a_token_meets() -> None:
    config = {
        **SMALL,
        "model_type": "qwen2_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    shape = shape_of(spec_of(config))
    assert shape.parameters - shape.active_parameters == 2 * 6 * 3 * 64 * 32


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_a_variant_that_the_formula_does_not_know_is_built(key: str) -> None:
    plain, variant = {"model_type": "llama", **SMALL}, {"model_type": "llama", **SMALL, key: True}
    assert has_formula(spec_of(plain))
    assert not has_formula(spec_of(variant))
    assert shape_of(spec_of(variant)).parameters > shape_of(spec_of(plain)).parameters


@pytest.mark.parametrize(
    ("keys", "rate"),
    [
        ({"model_type": "gpt2"}, 0.1),
        ({"model_type": "gpt2", "resid_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.1}, 0.0),
        ({"model_type": "llama"}, 0.0),
        ({"model_type": "opt"}, 0.1),
        ({"model_type": "gpt_neox", "hidden_dropout": 0.2, "attention_dropout": 0.1}, 0.2),
    ],
)
def test_dropout_is_the_largest_that_activations_pass(keys: dict[str, object], rate: float) -> None:
    assert dropout(spec_of(keys).model) == rate


# --- where it comes from ----------------------------------------------------------------------------------------------


def test_a_folder_is_written_out_and_then_needed_no_more(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    LlamaConfig(**SMALL, rope_parameters=rope).save_pretrained(tmp_path)
    spec = spec_of(str(tmp_path))
    (tmp_path / "config.json").unlink()
    again = parse_spec(parse_yaml(dump_spec(spec), "spec"))
    assert again == spec
    config = model_config(again)
    assert (config.model_type, config.rope_parameters, config.vocab_size) == ("llama", rope, 500)


def test_overrides_reach_into_a_folders_configuration(tmp_path: Path) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    document = load_spec("quickstart").model_dump(mode="json")
    document["model"] = {"family": "auto", "config": str(tmp_path)}
    (tmp_path / "spec.json").write_text(json.dumps(document))
    spec = load_spec(str(tmp_path / "spec.json"), ["model.config.num_hidden_layers=3"])
    assert (model_shape(spec).num_layers, model_shape(spec).hidden_size) == (3, 64)


def test_the_source_of_the_weights_is_that_of_the_configuration_too(tmp_path: Path) -> None:
    MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4).save_pretrained(tmp_path)
    init = f"init: {{kind: pretrained, name: '{tmp_path}'}}"
    spec = load_spec("quickstart", [f"model={{family: auto, {init}}}", "tokenizer={kind: bpe, vocab_size: 500}"])
    assert model_shape(spec).num_experts == 4


def test_a_light_command_reads_a_folder_where_torch_is_not_installed(tmp_path: Path) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path / "llama")
    GPTNeoXConfig(**SMALL).save_pretrained(tmp_path / "neox")
    found = light("validate", "quickstart", "--set", f"model={{family: auto, config: {tmp_path / 'llama'}}}")
    assert (found.returncode, found.stderr) == (0, "")
    refused = light("validate", "quickstart", "--set", f"model={{family: auto, config: {tmp_path / 'neox'}}}")
    assert refused.returncode == 2
    assert "model type gpt_neox, whose sizes no formula here has: they are traced, which needs torch" in refused.stderr
    assert refused.stderr.count("\n") == 1


def light(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command where nothing heavy can be imported."""
    blocked = WITHOUT_HEAVY_MODULES.replace("sys.modules[name] = None", "sys.modules[name] = None; hidden.add(name)")
    program = f"""
import importlib.util
hidden, usual = set(), importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in hidden else usual(name, *more)
{blocked}"""
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gptneox"},
            "model.config.model_type: given 'gptneox'; must be a type that this transformers has",
        ),
        ({"model_type": "gptneox"}, "did you mean gpt_neox"),
        ({**NEOX, "num_layers": 3}, "model.config.num_layers: no key of gpt_neox; did you mean num_hidden_layers?"),
        ({**NEOX, "dropout": 0.1}, "model.config.dropout: no key of gpt_neox; did you mean hidden_dropout?"),
        ({"model_type": "t5"}, "model.config: model type t5 is no decoder that predicts the next token"),
        ({**NEOX, "hiden_size": 32}, "model.config.hiden_size: no key of gpt_neox; did you mean hidden_size?"),
        (
            {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "hidden_size": 32},
            "model.config.hidden_size: given 32 beside n_embd 64",
        ),
        ({**NEOX, "hidden_size": "wide"}, "model.config: transformers takes it for no gpt_neox ("),
        (
            {**SMALL, "model_type": "bloom"},
            "model.attention: given sdpa with model type bloom, which has only the plain",
        ),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_in_one_line(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        model_config(spec_of(config))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unknown_key_that_says_nothing_is_left_alone() -> None:
    config = model_config(spec_of({**NEOX, "tie_encoder_decoder": False, "num_layers": None}))
    assert config.num_hidden_layers == 2


def test_a_type_that_is_missing_has_no_likeness() -> None:
    with pytest.raises(UserError, match=r"model_type: missing; must be a type .* has; for example llama$"):
        auto_config({})


def test_sizes_are_not_known_before_the_hub_is_asked() -> None:
    with pytest.raises(UserError, match="given 'some/model', no folder here: its sizes are known when it has been"):
        shape_of(spec_of("some/model"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": "wide"}, 'hidden_size: given "wide"; must be a positive whole number'),
        ({"hidden_size": None}, "hidden_size: given null; must be a positive whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: given 0; must be a positive whole number"),
        ({"max_position_embeddings": "x"}, 'max_position_embeddings: given "x"; must be a positive whole number'),
        ({"layer_types": 5}, "layer_types: given 5; must be a list of names, one for each layer"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings: given "yes"; must be true or false'),
        ({"vocab_size": True}, "vocab_size: given true; must be a positive whole number"),
        ({"num_layers": 3}, "num_layers: no key of llama; did you mean num_hidden_layers?"),
        ({"hidden_size": 66}, "num_attention_heads: given 4 with hidden_size 66; the heads must divide the width"),
        ({"head_dim": 7}, "head_dim: given 7; rotary positions need an even number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: given 3 with num_attention_heads 4; the former must divide"),
        (
            {"model_type": "gpt2", "n_embd": 64, "n_head": 5},
            "n_head: given 5 with n_embd 64; the heads must divide the width; try n_head 4, or n_embd 65",
        ),
        (
            {**EXPERTS, "num_experts_per_tok": 5},
            "num_experts_per_tok: given 5 with num_local_experts 4; a token cannot",
        ),
        ({**EXPERTS, "num_experts_per_tok": 1}, "num_experts_per_tok: given 1; the chosen experts share a weight of 1"),
        ({**EXPERTS, "intermediate_size": 100}, "intermediate_size: given 100 with precision bf16; experts are mult"),
    ],
)
def test_sizes_that_are_wrong_are_refused_before_torch_is_asked(keys: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError) as refusal:
        spec_of({"model_type": "llama", **SMALL, **keys}, "training.precision=bf16")
    assert [problem.startswith(f"model.config.{message}") for problem in refusal.value.problems] == [True], (
        refusal.value
    )


def test_a_bare_gpt2_reads_its_1024_positions() -> None:
    with pytest.raises(SpecError, match=r"batch\.sequence_length: given 2048; the model reads at most .* = 1024"):
        spec_of({"model_type": "gpt2"}, "batch.sequence_length=2048")


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused() -> None:
    spec = spec_of("no-such/model")
    with pytest.raises(UserError, match="given 'no-such/model': no folder with a config"):
        with_written_config(spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a folder without a config.json; give a Hugging Face model's folder"),
        ("[]", "given a list; a config.json is a JSON object"),
        ("{", "a config.json is a JSON object"),
    ],
)
def test_a_folder_that_holds_no_configuration_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        spec_of(str(tmp_path))


def test_the_rules_hold_for_what_a_folder_says(tmp_path: Path) -> None:
    LlamaConfig(**{**SMALL, "max_position_embeddings": 16}).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"batch\.sequence_length: given 256; the model reads at most"):
        spec_of(str(tmp_path))


# --- activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "olmo2", **SMALL},
        NEOX,
        {
            "model_type": "qwen3_moe",
            **SMALL,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 1024,
            "moe_intermediate_size": 128,
            "num_experts": 16,
            "num_experts_per_tok": 4,
        },
    ],
    ids=["olmo2", "gpt_neox", "qwen3_moe"],
)
def test_activations_of_a_type_without_a_formula_do_not_fall_short(config: dict[str, object]) -> None:
    spec = spec_of(config, "batch={sequence_length: 128, micro_batch_size: 4, global_batch_size: 4}")
    run = workload(spec, shape=shape_of(spec))
    traced = trace(model_config(spec), run, 4, "cuda").activations
    assert traced.saved_bytes <= activations(run, 4, "cuda").saved_bytes < 2.5 * traced.saved_bytes
