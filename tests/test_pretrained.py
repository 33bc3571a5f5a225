"""A folder that is broken is one line for every command that computes with it, and never text of random weights."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dsllm.cli.app import main
from dsllm.errors import UserError
from dsllm.model.pretrained import load_pretrained
from tests import hellaswag_rows
from tests.speaking_models import make_tokenizer, write_model

WEIGHTS = "model.safetensors"


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def without_some_weights(folder: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "h.1.mlp" not in name}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def without_a_shard(folder: Path) -> None:
    index = {"weight_map": {"one": "model-1.safetensors", "two": "model-2.safetensors"}}
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def config_that_is_damaged(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_type(folder: Path) -> None:
    set_config(folder, model_type="no-such-type")


def encoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 2}))


def encoder_and_decoder(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


def another_width(folder: Path) -> None:
    set_config(folder, n_embd=64)


def quantised_for_a_gpu(folder: Path) -> None:
    set_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def tokenizer_that_is_damaged(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def set_config(folder: Path, **keys: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


BROKEN: list[tuple[Callable[[Path], None], str, str]] = [
    (without_weights, ": there are no weights in it, neither ", "; give a folder that has them"),
    (without_some_weights, ": 4 of its model's ", "complete the folder, or take the model's whole one"),
    (
        without_a_shard,
        "/model.safetensors.index.json: names model-2.safetensors, which is not there",
        "fetch the model",
    ),
    (truncated, "/model.safetensors: cannot be read as weights (", "; copy it again"),
    (config_that_is_damaged, ": transformers cannot read its config.json (", "copy it again where it is damaged"),
    (unknown_type, ": transformers cannot read its config.json (", "a type that this version of transformers has"),
    (encoder, ": model type bert is no decoder that predicts the next token; ", "of a causal language model"),
    (encoder_and_decoder, ": model type t5 is no decoder that predicts the next token; ", "a causal language model"),
    (another_width, ": transformer.wte.weight is 512 x 32 where its config.json means 512 x 64; ", "from one model"),
    (quantised_for_a_gpu, ": transformers cannot load its weights (", "; mend that, or give the model in bf16 or fp32"),
    (without_tokenizer, ": there is no tokenizer in it; ", "copy the model's tokenizer beside its weights"),
    (tokenizer_that_is_damaged, ": its tokenizer cannot be read (", "; copy its files again"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hellaswag_rows.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", hellaswag_rows.rows(4))


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate"])
@pytest.mark.parametrize(("damage", "beginning", "remedy"), BROKEN, ids=[damage.__name__ for damage, *_ in BROKEN])
def test_a_broken_folder_is_one_line(
    whole: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    damage: Callable[[Path], None],
    beginning: str,
    remedy: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    damage(folder)
    flags = {"generate": ["--prompt", "a"], "chat": [], "evaluate": ["--hellaswag", str(rows)]}[command]
    monkeypatch.setenv("DSLLM_DEBUG", "")
    monkeypatch.setattr(sys, "argv", ["dsllm", command, str(folder), *flags])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n"), encoding="utf-8"))
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert said.err.startswith(f"dsllm: {folder}{beginning}")
    assert remedy in said.err
    assert said.err.count("\n") == 1


def test_state_beside_weights_is_read_which_training_would_refuse(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16, "n_routed_experts": 4, "vocab_size": 400}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **shape, moe_intermediate_size=16))
    state = next(name for name in model.state_dict() if "e_score_correction_bias" in name)
    model.get_buffer(state).fill_(0.5)
    model.save_pretrained(tmp_path)
    make_tokenizer("bpe").save_pretrained(tmp_path)
    again, _ = load_pretrained(tmp_path)
    assert torch.equal(again.get_buffer(state), model.get_buffer(state))
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[state]
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=f": 1 of its model's .* weights are not in its files, first {state}; "):
        load_pretrained(tmp_path)
