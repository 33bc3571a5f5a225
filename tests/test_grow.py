"""A grown model is a plain Hugging Face folder that holds exactly the source's tensors at the stated places."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig
from typer.testing import CliRunner

from dsllm.cli.app import app
from dsllm.errors import DsllmError, UserError
from dsllm.model import grow as grow_module
from dsllm.model.grow import grow
from tests.small_models import BLOCKS, origins, small_config, write_model, write_tokenizer

WHOLE = 10**9
FILE_BYTES = 32_000_000
"""Two layers of the model whose growth is watched, so that a file repeats one."""
GROWS_UNDER_WATCH = """
import re, sys, threading
from pathlib import Path
from dsllm.model.grow import grow
from dsllm.model.source import Source

def anonymous_bytes():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch(ended):
    while not ended.wait(0.001):
        peaks.append(anonymous_bytes())

folder, max_shard_bytes = Path(sys.argv[1]), int(sys.argv[2])
Source(folder / "source")  # imports and what stays of them
for number, layers in enumerate(sys.argv[3:]):
    before, peaks, ended = anonymous_bytes(), [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(ended,))
    watcher.start()
    grow(str(folder / "source"), folder / str(number), layers, max_shard_bytes=max_shard_bytes)
    ended.set()
    watcher.join()
    print(max(peaks) - before)
"""
"""The most that each list of layers took of memory that is in no file, in a process of its own."""


@pytest.mark.parametrize(
    ("family", "layers", "expected"),
    [
        ("gpt2", "0-7,4-11", [*range(8), *range(4, 12)]),
        ("llama", "0-7,4-11", [*range(8), *range(4, 12)]),
        ("llama", "0-4,7-11", [*range(5), *range(7, 12)]),
        ("mistral", "0-1,1,0", [0, 1, 1, 0]),
        ("qwen2", "0-1,1,0", [0, 1, 1, 0]),
        ("qwen3", "0-1,1,0", [0, 1, 1, 0]),
        ("mixtral", "0-1,1,0", [0, 1, 1, 0]),
    ],
)
@pytest.mark.parametrize("max_shard_bytes", [300_000, WHOLE], ids=["sharded", "one file"])
def test_transformers_finds_each_tensor_of_the_source_where_the_list_says(
    tmp_path: Path, family: str, layers: str, expected: list[int], max_shard_bytes: int
) -> None:
    source = dict(write_model(tmp_path / "source", small_config(family, 1 + max(expected))).named_parameters())
    grow(str(tmp_path / "source"), tmp_path / "grown", layers, max_shard_bytes=max_shard_bytes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert model.config.num_hidden_layers == len(expected)
    found, expected_origins = dict(model.named_parameters()), origins(list(source), BLOCKS[family], expected)
    assert found.keys() == expected_origins.keys()
    for name, origin in expected_origins.items():
        assert torch.equal(found[name], source[origin]), f"{name} is not {origin}"
    assert ((tmp_path / "grown" / "model.safetensors").exists()) == (max_shard_bytes == WHOLE)


def test_files_stay_within_their_size_and_the_index_names_each_tensor(tmp_path: Path) -> None:
    write_model(tmp_path / "source", small_config("llama", 4))
    grow(str(tmp_path / "source"), tmp_path / "grown", "0-2,1-3", max_shard_bytes=400_000)
    index = json.loads((tmp_path / "grown" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "grown").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, 6)]
    held = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            held |= dict.fromkeys(handle.keys(), file.name)
            assert sum(handle.get_tensor(name).nbytes for name in handle.keys()) <= 400_000  # noqa: SIM118
    assert index["weight_map"] == held


def test_what_is_said_of_each_layer_goes_with_it(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    write_model(tmp_path / "source", qwen(kinds))
    grow(str(tmp_path / "source"), tmp_path / "grown", "0-1,0,2", max_shard_bytes=WHOLE)
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert config["layer_types"] == [kinds[0], kinds[1], kinds[0], kinds[2]]


def test_tokenizer_and_settings_go_along_and_the_sources_readme_does_not(tmp_path: Path) -> None:
    write_model(tmp_path / "source", small_config("llama"))
    write_tokenizer(tmp_path / "source", 500)
    for name in ("README.md", "LICENSE", "pytorch_model.bin"):
        (tmp_path / "source" / name).write_text("of the source")
    grow(str(tmp_path / "source"), tmp_path / "grown", "0-1", max_shard_bytes=WHOLE)
    assert {file.name for file in (tmp_path / "grown").iterdir()} == {
        "LICENSE", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


def test_half_precision_stays_as_it_is(tmp_path: Path) -> None:
    write_model(tmp_path / "source", small_config("llama")).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    grow(str(tmp_path / "source"), tmp_path / "grown", "0-1", max_shard_bytes=WHOLE)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype="auto").dtype == torch.bfloat16


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much of a process is in no file")
def test_no_more_is_in_memory_than_the_layers_that_one_file_repeats(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 128}
    write_model(tmp_path / "source", small_config("llama", 6, **shape), WHOLE)
    cases = ["0-5,0-5", "0,0,0,0,0,0"]
    command = [sys.executable, "-c", GROWS_UNDER_WATCH, str(tmp_path), str(FILE_BYTES), *cases]
    once, repeated = map(int, subprocess.check_output(command, text=True, timeout=120).split())
    assert (tmp_path / "source" / "model.safetensors").stat().st_size > 2 * FILE_BYTES
    assert once < FILE_BYTES / 4
    assert FILE_BYTES / 4 < repeated < 1.2 * FILE_BYTES, "a layer of a file is copied for each time but the first"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_came_from_where(tmp_path: Path) -> None:
    write_model(tmp_path / "source", small_config("gpt2", 4))
    arguments = ["grow", str(tmp_path / "source"), str(tmp_path / "grown"), "--layers", "0-2,2-3,1", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    layer = 2 * 2 * 64 + 4 * 64 * 64 + 4 * 64 + 8 * 64 * 64 + 5 * 64
    assert json.loads(result.stdout) == [
        {"name": "transformer.ln_f", "origin": "transformer.ln_f", "tensors": 2, "parameters": 128},
        {"name": "transformer.wpe", "origin": "transformer.wpe", "tensors": 1, "parameters": 32 * 64},
        {"name": "transformer.wte", "origin": "transformer.wte", "tensors": 1, "parameters": 500 * 64},
        {"name": "layers 0-2", "origin": "layers 0-2", "tensors": 36, "parameters": 3 * layer},
        {"name": "layers 3-4", "origin": "layers 2-3", "tensors": 24, "parameters": 2 * layer},
        {"name": "layer 5", "origin": "layer 1", "tensors": 12, "parameters": layer},
    ]
    shutil.rmtree(tmp_path / "grown")
    table = CliRunner().invoke(app, arguments[:-1]).stdout
    assert "layers 3-4" in table
    assert table.endswith(
        f"{128 + 32 * 64 + 500 * 64 + 6 * layer:,} parameters, read back, and each tensor is the source's\n"
    )


def test_the_command_tells_of_tensors_that_are_no_part_of_the_model(tmp_path: Path) -> None:
    write_model(tmp_path / "source", small_config("gpt2"), WHOLE)
    file = tmp_path / "source" / "model.safetensors"
    more = {"transformer.h.0.adapter.weight": torch.ones(3, 3), "value_head.weight": torch.ones(1, 64)}
    save_file({**load_file(file), **more}, file, {"format": "pt"})
    arguments = ["grow", str(tmp_path / "source"), str(tmp_path / "grown"), "--layers", "0-2", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == (
        f"{tmp_path}/source: 2 tensors are no part of its model, first transformer.h.0.adapter.weight; left out\n"
    )
    assert sum(part["tensors"] for part in json.loads(result.stdout)) == len(load_file(file)) - 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0-3", "--layers: given '0-3', with layer 3; SOURCE has layers 0 to 2; name those"),
        ("2-0", "--layers: given '2-0', where 2-0 goes down; "),
        ("", "--layers: given ''; must be ranges of layers"),
    ],
)
def test_layers_that_the_source_has_not_are_refused_and_nothing_is_written(
    tmp_path: Path, layers: str, message: str
) -> None:
    write_model(tmp_path / "source", small_config("llama"))
    with pytest.raises(UserError) as refused:
        grow(str(tmp_path / "source"), tmp_path / "grown", layers, max_shard_bytes=WHOLE)
    assert str(refused.value).startswith(message.replace("SOURCE", str(tmp_path / "source")))
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "grown").mkdir()
    (tmp_path / "grown" / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"grown: not empty; choose another folder for the new model, or empty it"):
        grow(str(tmp_path / "source"), tmp_path / "grown", "0", max_shard_bytes=WHOLE)
    assert (tmp_path / "grown" / "mine").read_text() == "mine"


def test_what_is_not_the_same_when_it_is_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "source", small_config("llama"))

    def save_one_bit_off(tensors: dict[str, torch.Tensor], *given: object, **named: object) -> None:
        tensors = {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1e-6}
        save_file(tensors, *given, **named)

    save_file = grow_module.save_file
    monkeypatch.setattr(grow_module, "save_file", save_one_bit_off)
    with pytest.raises(DsllmError, match=r"model\.norm\.weight is not model\.norm\.weight when it is read back; "):
        grow(str(tmp_path / "source"), tmp_path / "grown", "0-1", max_shard_bytes=WHOLE)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def qwen(kinds: list[str]) -> PretrainedConfig:
    from transformers import Qwen2Config

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": len(kinds), "num_attention_heads": 4}
    return Qwen2Config(
        vocab_size=300, num_key_value_heads=2, layer_types=kinds, use_sliding_window=True, sliding_window=8, **sizes
    )
