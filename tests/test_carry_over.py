"""A run's model holds exactly the source's tensors at the stated places, in a network that is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from dsllm.errors import SpecError, UserError
from dsllm.model.build import DTYPES, build_model, model_config
from dsllm.model.carry_over import CarryOver, open_carry_over
from dsllm.model.configs import with_written_config
from dsllm.model.grow import grow
from dsllm.model.source import Source
from dsllm.model.source_tokenizer import refuse_another_tokenizer, tokens_by_id
from dsllm.model.vocabulary_rows import VocabularyRows
from dsllm.spec.load import dump_spec, load_spec
from dsllm.spec.sections import Spec
from tests.small_models import BLOCKS, origins, small_config, spec_model, write_model, write_tokenizer

FAMILIES = pytest.mark.parametrize("family", BLOCKS)


def spec_from(folder: Path, family: str, num_layers: int, layers: str | None = None, *overrides: str) -> Spec:
    """A spec of the small model's network that starts from `folder`, over 500 tokens."""
    tokens = ["tokenizer={kind: bpe, vocab_size: 500}", "batch.sequence_length=16"]
    return load_spec("quickstart", [spec_model(family, folder, num_layers, layers), *tokens, *overrides])


def automatic(folder: Path, layers: str | None = None, *overrides: str) -> Spec:
    """A spec that leaves the network to the model in `folder`."""
    listed = f", layers: '{layers}'" if layers else ""
    model = f"model={{family: auto, vocab_size: 500, init: {{kind: pretrained, name: '{folder}'{listed}}}}}"
    return load_spec(
        "quickstart", [model, "tokenizer={kind: bpe, vocab_size: 500}", "batch.sequence_length=16", *overrides]
    )


def started(spec: Spec) -> PreTrainedModel:
    """The model of a spec with every weight from its source, as a rank without ZeRO-3 has it."""
    carry_over, _ = open_carry_over(spec, spec.model.init)
    model = build_model(model_config(spec), DTYPES[spec.training.precision])
    for name, parameter in model.named_parameters():
        carry_over.fill(name, parameter)
    return model


# --- layers -----------------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize(
    ("depth", "layers", "expected"),
    [
        (12, "0-7,4-11", [*range(8), *range(4, 12)]),
        (12, "0-4,7-11", [*range(5), *range(7, 12)]),
        (3, "2,0-1,0-2", [2, 0, 1, 0, 1, 2]),
        (3, None, [0, 1, 2]),
    ],
    ids=["up-scaled", "down-scaled", "in any order", "all"],
)
def test_each_layer_is_the_one_that_is_listed_and_all_else_is_carried_over(
    tmp_path: Path, family: str, depth: int, layers: str | None, expected: list[int]
) -> None:
    source = dict(write_model(tmp_path, small_config(family, depth)).named_parameters())
    spec = spec_from(
        tmp_path, family, len(expected), layers, "model.vocab_padding_multiple=1", "training.precision=fp32"
    )
    found, blocks = dict(started(spec).named_parameters()), BLOCKS[family]
    expected_origins = origins(list(source), blocks, expected)
    assert found.keys() == expected_origins.keys()
    for name, origin in expected_origins.items():
        assert torch.equal(found[name], source[origin]), f"{name} is not {origin}"


@pytest.mark.parametrize("layers", [None, "0-1,1-2"])
def test_an_automatic_model_takes_the_sources_configuration_with_the_listed_layers(
    tmp_path: Path, layers: str | None
) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    windows = {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    source = dict(write_model(tmp_path, small_config("qwen2", **windows)).named_parameters())
    numbers = [0, 1, 2] if layers is None else [0, 1, 1, 2]
    model = started(automatic(tmp_path, layers, "training.precision=fp32"))
    assert model.config.layer_types == [kinds[number] for number in numbers]
    for name, origin in origins(list(source), BLOCKS["qwen2"], numbers).items():
        found, expected = model.get_parameter(name), source[origin]
        assert torch.equal(found[: len(expected)], expected), f"{name} is not {origin}"


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_kinds_of_layers_that_follow_from_their_numbers_go_with_the_layers(tmp_path: Path, family: str) -> None:
    windows = {"use_sliding_window": True, "max_window_layers": 2} if family == "qwen2" else {}
    model = write_model(tmp_path, small_config(family, 8, sliding_window=8, **windows))
    keys = json.loads((tmp_path / "config.json").read_text())
    kinds = keys.pop("layer_types")
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert len(set(kinds)) == 2
    spec = with_written_config(automatic(tmp_path, "0-3,5,7", IN_FP32, "model.attention=eager"))
    found, numbers = started(spec), [0, 1, 2, 3, 5, 7]
    assert found.config.layer_types == [kinds[number] for number in numbers]
    source = dict(model.named_parameters())
    for name, origin in origins(list(source), "model.layers", numbers).items():
        assert torch.equal(found.get_parameter(name)[: len(source[origin])], source[origin]), f"{name} is not {origin}"


def test_an_automatic_model_of_layers_that_the_source_has_not_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("qwen2"))
    with pytest.raises(UserError, match=r"^model\.init\.layers: given '0-3', with layer 3; .* has layers 0 to 2; name"):
        automatic(tmp_path, "0-3")


def test_a_configuration_that_does_not_say_its_depth_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("qwen2"))
    keys = json.loads((tmp_path / "config.json").read_text())
    del keys["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(UserError, match=r"^model\.init\.layers: the config\.json of the model does not say how many"):
        automatic(tmp_path, "0-1")


def test_an_automatic_model_of_another_configuration_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("qwen2"))
    keys = small_config("qwen2", rms_norm_eps=1e-6).to_diff_dict()
    spec = automatic(tmp_path, None, f"model.config={json.dumps({**keys, 'model_type': 'qwen2'})}")
    assert problems(spec) == [
        f"model.config: rms_norm_eps is 1e-06; {tmp_path} has 1e-05; leave model.config out to take that of {tmp_path}"
    ]


def test_a_run_goes_on_with_the_configuration_it_began_with_when_the_source_is_gone(tmp_path: Path) -> None:
    source, run_spec = tmp_path / "source", tmp_path / "spec.yaml"
    write_model(source, small_config("qwen2"))
    began = automatic(source, "0-1,1-2")
    run_spec.write_text(dump_spec(began))
    shutil.rmtree(source)
    now = automatic(source, "0-1,1-2")
    assert now.model.config is None
    assert with_written_config(now, run_spec) == began
    with pytest.raises(UserError, match=r"^model\.config: given '.*source'"):
        with_written_config(now, tmp_path / "none.yaml")


def test_weights_take_the_precision_of_the_training(tmp_path: Path) -> None:
    source = dict(write_model(tmp_path, small_config("llama")).named_parameters())
    model = started(spec_from(tmp_path, "llama", 3, None, "training.precision=bf16"))
    assert torch.equal(model.model.norm.weight, source["model.norm.weight"].bfloat16())


def test_a_type_that_cannot_be_trained_is_refused_as_such(tmp_path: Path) -> None:
    from transformers import GPTJConfig

    write_model(tmp_path, GPTJConfig(vocab_size=500, n_positions=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8))
    spec = with_written_config(automatic(tmp_path, None, "model.attention=eager"))
    assert refusal(spec).startswith("model.config: model type gptj has no output projection, or one with a bias, ")


def test_a_weight_that_the_source_has_not_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("llama"))
    with pytest.raises(UserError, match=r"it has no model\.layers\.0\.self_attn\.q_proj\.bias, of which .* would be"):
        CarryOver(
            Source(tmp_path), small_config("llama", attention_bias=True), None, VocabularyRows(500, 500, 500, 500)
        )


@pytest.mark.parametrize(("layers", "where"), [("0,2,3", (2, 1)), ("0,1,1,2", (1, 2))])
def test_a_layer_of_another_kind_than_its_new_place_is_refused(
    tmp_path: Path, layers: str, where: tuple[int, int]
) -> None:
    write_model(tmp_path / "source", small_config("qwen2_moe", 4, mlp_only_layers=[1], **FEW_EXPERTS))
    old, new = f"layer {where[0]} of {tmp_path}/source", f"layer {where[1]} of the new model"
    expected = f"^{old} has mlp\\.[a-z_.]+ where {new} has none, or one of another size; list layers of one kind$"
    with pytest.raises(UserError, match=expected):
        grow(str(tmp_path / "source"), tmp_path / "grown", layers, max_shard_bytes=10**9)
    spec = with_written_config(automatic(tmp_path / "source", layers))
    with pytest.raises(UserError, match=expected):
        open_carry_over(spec, spec.model.init)


def test_layers_outside_the_source_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("llama"))
    spec = spec_from(tmp_path, "llama", 4, "0-3")
    assert refusal(spec) == (f"model.init.layers: given '0-3', with layer 3; {tmp_path} has layers 0 to 2; name those")


def test_a_family_whose_layers_are_not_one_list_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig

    from dsllm.model.depth import blocks_name
    from dsllm.model.source import build_skeleton

    config = AutoConfig.for_model("openai-gpt", n_layer=2, n_embd=64, n_head=4, vocab_size=99)
    with pytest.raises(UserError, match=r"^openai-gpt: a model of this type has 0 lists of layers, and from which one"):
        blocks_name(build_skeleton(config, "openai-gpt"))


# --- the vocabulary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_new_tokens_are_the_mean_of_the_known_ones(tmp_path: Path, tied: bool) -> None:
    source = write_model(tmp_path, small_config("llama", vocab_size=480, tie_word_embeddings=tied))
    write_tokenizer(tmp_path, 470)
    model = started(spec_from(tmp_path, "llama", 3, None, IN_FP32, f"model.tie_word_embeddings={str(tied).lower()}"))
    tables = [(model.get_input_embeddings(), source.get_input_embeddings())]
    tables += [] if tied else [(model.get_output_embeddings(), source.get_output_embeddings())]
    for found, expected in tables:
        assert found.weight.shape == (512, 64)
        assert torch.equal(found.weight[:470], expected.weight[:470])
        mean = expected.weight[:470].mean(0)  # not of the 10 rows that are no tokens
        torch.testing.assert_close(found.weight[470:], mean.expand(42, 64), atol=1e-7, rtol=0)


def test_rows_of_padding_stay_what_they_were_where_the_source_has_them(tmp_path: Path) -> None:
    source = write_model(tmp_path, small_config("llama", vocab_size=512))
    model = started(spec_from(tmp_path, "llama", 3, None, IN_FP32))
    assert torch.equal(model.get_input_embeddings().weight, source.get_input_embeddings().weight)


def test_rows_that_no_token_of_the_run_uses_are_left_out(tmp_path: Path) -> None:
    source = write_model(tmp_path, small_config("llama", vocab_size=700))
    write_tokenizer(tmp_path, 490)
    model = started(spec_from(tmp_path, "llama", 3, None, IN_FP32))
    found, expected = (each.get_input_embeddings().weight for each in (model, source))
    assert found.shape == (512, 64)
    assert torch.equal(found[:490], expected[:490])
    torch.testing.assert_close(found[490:500], expected[:490].mean(0).expand(10, 64), atol=1e-7, rtol=0)
    assert torch.equal(found[500:], expected[500:512]), "no token has them"


def test_the_mean_is_taken_in_fp32_whatever_the_weights_are_in(tmp_path: Path) -> None:
    source = write_model(tmp_path, small_config("llama", vocab_size=400)).to(torch.bfloat16)
    source.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, 400)
    model = started(spec_from(tmp_path, "llama", 3, None, "training.precision=fp32"))
    mean = source.get_input_embeddings().weight.float().mean(0)
    torch.testing.assert_close(model.get_input_embeddings().weight[400], mean, atol=1e-7, rtol=0)


def test_a_model_that_cannot_hold_the_sources_tokens_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("llama", vocab_size=640))
    write_tokenizer(tmp_path, 600)
    assert refusal(spec_from(tmp_path, "llama", 3)) == (
        f"model.vocab_size: given 500; {tmp_path} knows 600 tokens, with which those of the run must begin; set it to "
        "600 or more"
    )


def test_without_a_tokenizer_the_source_must_have_a_row_for_every_token(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("llama", vocab_size=400))
    assert refusal(spec_from(tmp_path, "llama", 3)) == (
        f"model.vocab_size: given 500; {tmp_path} has 400 rows, and no tokenizer that would say of which tokens; put "
        "its tokenizer into its folder"
    )


def test_tokens_are_compared_by_number_and_the_first_that_differs_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("llama"))
    write_tokenizer(tmp_path, 400)
    source = tokens_by_id(tmp_path)
    refuse_another_tokenizer({**source, 400: "new"}, source, "out/small")  # an extension
    with pytest.raises(UserError) as refused:
        refuse_another_tokenizer({**source, 7: "seven", 9: "nine"}, source, "out/small")
    assert str(refused.value) == (
        "tokenizer: token 7 is 'seven', and in out/small, which the model starts from, is 'word7'; set tokenizer to "
        "{kind: pretrained, name: out/small}, or to one that adds tokens to it"
    )
    with pytest.raises(UserError, match=r"^tokenizer: token 399 does not exist, and in out/small"):
        refuse_another_tokenizer({number: source[number] for number in range(399)}, source, "out/small")


def test_a_folder_without_a_tokenizer_has_no_tokens_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    assert tokens_by_id(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r": its tokenizer cannot be read \(.+\); mend it, or take its files away"):
        tokens_by_id(tmp_path)


def test_code_of_a_tokenizer_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers would ask, and someone say yes
    write_tokenizer(tmp_path, 5)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r": its tokenizer cannot be read \(.+ contains custom code"):
        tokens_by_id(tmp_path)


# --- the same network -------------------------------------------------------------------------------------------------


def test_fewer_learned_positions_are_the_first_of_the_sources(tmp_path: Path) -> None:
    source = write_model(tmp_path, small_config("gpt2"))
    model = started(spec_from(tmp_path, "gpt2", 3, None, IN_FP32, "model.max_position_embeddings=20"))
    assert torch.equal(model.transformer.wpe.weight, source.transformer.wpe.weight[:20])


def test_more_learned_positions_are_refused_and_more_rotary_ones_are_not(tmp_path: Path) -> None:
    for family in ("gpt2", "llama"):
        write_model(tmp_path / family, small_config(family))
    more = "model.max_position_embeddings=64"
    assert refusal(spec_from(tmp_path / "gpt2", "gpt2", 3, None, more)) == (
        f"model.max_position_embeddings: given 64; {tmp_path}/gpt2 has learned 32 positions, and no more can be had; "
        "set it to 32 or less"
    )
    started(spec_from(tmp_path / "llama", "llama", 3, None, more))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_two_names_of_one_formula_are_the_same_activation(tmp_path: Path, activation: str) -> None:
    write_model(tmp_path, small_config("gpt2", activation_function=activation))
    started(spec_from(tmp_path, "gpt2", 3))


@pytest.mark.parametrize(
    ("family", "shape", "problem"),
    [
        ("gpt2", {"n_head": 8}, "model.num_attention_heads: given 4; NAME has 8; set it to 8"),
        ("gpt2", {"n_inner": 128}, "model.intermediate_size: given 256; NAME has 128; set it to 128"),
        ("gpt2", {"layer_norm_epsilon": 1e-6}, "model.norm_epsilon: given 1e-05; NAME has 1e-06; set it to 1e-06"),
        (
            "gpt2",
            {"activation_function": "relu"},
            "model.family: gpt2 has activation_function gelu_new; NAME has relu; set model.family to auto",
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "model.family: gpt2 has scale_attn_by_inverse_layer_idx False; NAME has True; set model.family to auto",
        ),
        ("llama", {"num_key_value_heads": 4}, "model.num_key_value_heads: given 2; NAME has 4; set it to 4"),
        ("llama", {"head_dim": 32}, "model.head_size: given 16; NAME has 32; set it to 32"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "model.rope_theta: given 10000.0; NAME has 500000.0; set it to 500000.0",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "model.family: llama has rope_parameters {'rope_theta': 10000.0}; NAME has {'factor': 2.0, 'rope_theta': "
            "10000.0, 'rope_type': 'linear'}; set model.family to auto",
        ),
        ("llama", {"attention_bias": True}, "model.family: llama has attention_bias False; NAME has True; set model"),
        (
            "llama",
            {"tie_word_embeddings": False},
            "model.tie_word_embeddings: given true; NAME has false; set it to false",
        ),
    ],
)
def test_a_network_that_computes_something_else_is_refused(
    tmp_path: Path, family: str, shape: dict[str, Any], problem: str
) -> None:
    write_model(tmp_path, small_config(family, **shape))
    (found,) = problems(spec_from(tmp_path, family, 3))
    assert found.startswith(problem.replace("NAME", str(tmp_path)))


def test_every_difference_is_told_at_once(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("llama", num_layers=2, hidden_size=96, head_dim=16, intermediate_size=128))
    message = refusal(spec_from(tmp_path, "llama", 3))
    assert message.splitlines() == [
        f"model.init.name: {tmp_path} is another network: 3 problems",
        f"  model.hidden_size: given 64; {tmp_path} has 96; set it to 96",
        f"  model.intermediate_size: given 256; {tmp_path} has 128; set it to 128",
        f"  model.num_layers: given 3; {tmp_path} has 2; set it to 2, or list the layers to take in model.init.layers",
    ]


def test_another_family_is_refused_by_its_name(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("gpt2"))
    assert problems(spec_from(tmp_path, "llama", 3)) == [
        f"model.family: given llama; {tmp_path} is of family gpt2; set model.family to gpt2"
    ]


def test_a_model_of_another_width_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("gpt2"))
    with pytest.raises(UserError) as refused:
        CarryOver(Source(tmp_path), small_config("gpt2", n_inner=512), None, ROWS)
    assert str(refused.value) == (
        f"{tmp_path}: transformer.h.0.mlp.c_fc.weight is 64 x 256, and transformer.h.0.mlp.c_fc.weight of the model is "
        "to be 64 x 512; give the spec the model's own sizes"
    )


ROWS = VocabularyRows(500, 500, 500, 500)
IN_FP32 = "training.precision=fp32"
FEW_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16
}  # fmt: skip


def refusal(spec: Spec) -> str:
    with pytest.raises(UserError) as refused:
        open_carry_over(spec, spec.model.init)
    return str(refused.value)


def problems(spec: Spec) -> list[str]:
    with pytest.raises(SpecError) as refused:
        open_carry_over(spec, spec.model.init)
    return refused.value.problems
