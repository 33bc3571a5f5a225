"""An existing model, read one parameter at a time, is what transformers reads of it at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dsllm.errors import UserError
from dsllm.model.source import Source, build_skeleton, read_config
from dsllm.model.source_files import find_folder, weight_files
from tests.small_models import BLOCKS, small_config, write_model

WHOLE = 10**9


CONFIGS = {family: small_config(family) for family in BLOCKS}
CONFIGS["llama, untied"] = small_config("llama", tie_word_embeddings=False)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard_bytes", [100_000, WHOLE], ids=["sharded", "one file"])
def test_every_parameter_is_read_as_transformers_wrote_it(tmp_path: Path, name: str, shard_bytes: int) -> None:
    model = write_model(tmp_path, CONFIGS[name], shard_bytes)
    source = Source(tmp_path)
    assert (len(source.files) > 1) == (shard_bytes != WHOLE)
    assert_same(source, model)
    assert source.conversion.unused == []


def test_files_without_the_prefix_of_the_base_model_are_read(tmp_path: Path) -> None:
    """As the original GPT-2 on the Hub has them, with masks that are no parameters."""
    model = write_model(tmp_path, small_config("gpt2"), WHOLE)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32) for layer in range(3)}
    save_file(tensors, file, {"format": "pt"})
    source = Source(tmp_path)
    assert_same(source, model)
    assert source.conversion.unused == []


def test_torchs_own_files_are_read_without_running_what_they_bring(tmp_path: Path) -> None:
    model = write_model(tmp_path, small_config("llama"), WHOLE)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # both names of the tied embedding
    assert_same(Source(tmp_path), model)


def test_a_tied_parameter_is_found_by_its_other_name(tmp_path: Path) -> None:
    model = write_model(tmp_path, small_config("llama"), WHOLE)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    assert_same(Source(tmp_path), model)


def test_the_type_on_disk_is_kept(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("gpt2")).to(torch.bfloat16).save_pretrained(tmp_path)
    assert Source(tmp_path).read("transformer.wte.weight").dtype == torch.bfloat16


def test_tensors_that_are_no_part_of_the_model_are_told(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("gpt2"), WHOLE)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "value_head.weight": torch.ones(1, 64)}, file, {"format": "pt"})
    assert Source(tmp_path).conversion.unused == ["value_head.weight"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", small_config("llama"))
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        Source(find_folder(str(folder)))
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").endswith(
        "absent: there is no such folder; give a Hugging Face folder, or a name on the Hub"
    )


def test_a_name_that_the_hub_cannot_give_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^no/such-model: no folder of that name, and the Hub gives no such model \(.+\)"
    ):
        find_folder("no/such-model")


def test_a_run_takes_what_is_downloaded_and_names_the_command_for_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--small" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("1234")
    (snapshot / "config.json").write_text("{}")
    for name, revision, options in [("some/small", None, ""), ("no/such", "v2", " --revision v2")]:
        with pytest.raises(UserError) as refused:
            find_folder(name, revision, may_download=False)
        assert str(refused.value) == (
            f"{name}: no folder of that name, and not downloaded here, for which every rank would wait; first run "
            f"hf download {name}{options} on the host of rank 0"
        )
    write_model(snapshot, small_config("llama"))
    assert Source(find_folder("some/small", may_download=False)).config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["run", "global_step40"])
def test_a_run_is_refused_with_the_command_that_exports_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "checkpoints").mkdir(parents=True)
    if name != "run":
        (tmp_path / name / "checkpoints").rmdir()
    path = tmp_path / name
    assert refusal(path) == (
        f"{path}: a run, whose weights lie in DeepSpeed's layout; first run dsllm export {path} OUT"
    )


def test_a_folder_without_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert ": there is no config.json in it; " in refusal(folder)


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-type"}', "{}"])
def test_a_configuration_that_transformers_cannot_read_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert ": transformers cannot read its config.json (" in refusal(folder)


def test_code_that_a_folder_brings_does_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers would ask, and someone say yes
    (folder / "evil.py").write_text("raise SystemExit('it ran')\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    assert ": transformers cannot read its config.json (" in refusal(folder)


def test_a_type_that_transformers_has_is_its_own_and_not_the_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (folder / "evil.py").write_text("raise SystemExit('it ran')\n")
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "auto_map": {"AutoConfig": "evil.Evil"}}))
    assert type(Source(folder).config).__name__ == "LlamaConfig"


def test_quantised_weights_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    assert ": its weights are quantised, which cannot be trained on; " in refusal(folder)


def test_a_model_that_predicts_no_next_token_is_refused(tmp_path: Path) -> None:
    for model_type in ("vit", "bert", "t5"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert f": model type {model_type} is no decoder that predicts the next token; " in refusal(tmp_path)


def test_a_model_of_which_text_is_only_a_part_is_refused() -> None:
    with pytest.raises(UserError, match=r"^gemma: its configuration holds others, as that of a model of text and imag"):
        build_skeleton(AutoConfig.for_model("gemma3"), "gemma")


def test_a_configuration_of_which_no_model_can_be_built_is_refused(folder: Path) -> None:
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "hidden_act": "no-such"}))
    assert ": transformers builds no model of its config.json (" in refusal(folder)


def test_a_model_with_state_that_is_no_weight_is_refused() -> None:
    config = AutoConfig.for_model("glm4_moe", num_hidden_layers=2, hidden_size=64, head_dim=16)
    with pytest.raises(
        UserError, match=r"^glm4: its models keep state beside their weights, .*e_score_correction_bias, "
    ):
        build_skeleton(config, "glm4")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    for file in weight_files(folder):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    assert refusal(folder) == (
        f"{folder}: there are no weights in it, neither model.safetensors nor pytorch_model.bin, nor an index of "
        "either; give a folder that has them"
    )


def test_a_file_of_the_index_that_is_not_there_is_named(folder: Path) -> None:
    files = weight_files(folder)
    files[1].unlink()
    message = refusal(folder)
    assert f"model.safetensors.index.json: names {files[1].name}, which is not there (1 of {len(files)}); " in message


def test_an_index_that_is_none_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json: no list of files and their tensors (" in refusal(folder)


def test_a_file_that_is_cut_short_is_refused(folder: Path) -> None:
    file = weight_files(folder)[0]
    file.write_bytes(file.read_bytes()[:-100])
    assert refusal(folder).startswith(f"{file}: cannot be read as weights (")


def test_a_file_of_torchs_that_would_run_code_is_refused(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({"model.norm.weight": Path("/")}, folder / "pytorch_model.bin")
    assert refusal(folder).startswith(f"{folder}/pytorch_model.bin: cannot be read as weights (")


def test_weights_that_are_missing_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("llama"), WHOLE)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp" not in name}
    save_file(tensors, file, {"format": "pt"})
    assert refusal(tmp_path) == (
        f"{tmp_path}: 3 of its model's 29 weights are not in its files, first model.layers.1.mlp.gate_proj.weight; "
        "complete the folder, or take the model's whole one"
    )


def test_weights_of_another_width_than_the_configuration_says_are_refused(folder: Path) -> None:
    AutoConfig.from_pretrained(folder, intermediate_size=512).save_pretrained(folder)
    assert refusal(folder) == (
        f"{folder}: model.layers.0.mlp.gate_proj.weight is 256 x 64 where its config.json means 512 x 64; bring the "
        "two together from one model"
    )


def test_weights_of_another_vocabulary_than_the_configuration_says_are_refused(folder: Path) -> None:
    AutoConfig.from_pretrained(folder, vocab_size=512).save_pretrained(folder)
    assert ": model.embed_tokens.weight is 500 x 64 where its config.json means 512 x 64; " in refusal(folder)


def test_tied_weights_that_differ_on_disk_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, small_config("llama"), WHOLE)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": torch.zeros(500, 64)}, file, {"format": "pt"})
    assert (
        ": its config.json ties lm_head.weight to model.embed_tokens.weight, and its files hold different"
        in refusal(tmp_path)
    )


def test_a_configuration_is_read_without_its_weights(folder: Path) -> None:
    for file in weight_files(folder):
        file.unlink()
    assert read_config(folder).num_hidden_layers == 3


def assert_same(source: Source, model: PreTrainedModel) -> None:
    expected = dict(model.named_parameters())
    assert {name for name, _ in source.skeleton.named_parameters()} == expected.keys()
    for name, parameter in expected.items():
        assert source.shape(name) == parameter.shape
        assert torch.equal(source.read(name), parameter), name
    assert_as_transformers_reads(source.folder, model)


def assert_as_transformers_reads(folder: Path, model: PreTrainedModel) -> None:
    again = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert all(torch.equal(again[name], parameter) for name, parameter in model.named_parameters())
