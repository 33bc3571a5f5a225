"""Small models in folders that transformers wrote, to start from, and the specs of the same network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

SHARD_BYTES = 100_000
"""So small that every model has several files."""
BLOCKS = {
    "gpt2": "transformer.h",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "mixtral"), "model.layers"),
}
"""Names of the lists of layers."""
SPEC_SHAPES = {
    "gpt2": "",
    "llama": ", num_key_value_heads: 2, intermediate_size: 256",
    "mistral": ", num_key_value_heads: 2, intermediate_size: 256, sliding_window: 8",
    "qwen2": ", num_key_value_heads: 2, intermediate_size: 256",
    "qwen3": ", num_key_value_heads: 2, intermediate_size: 256, head_size: 32",
    "mixtral": ", num_key_value_heads: 2, intermediate_size: 128, num_experts: 4, num_experts_per_token: 2",
}


def small_config(family: str, num_layers: int = 3, vocab_size: int = 500, **shape: Any) -> PretrainedConfig:
    """transformers' configuration of `spec_model(family)`: width 64, 4 heads, 32 positions, tied."""
    keys: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        keys |= {"n_embd": 64, "n_head": 4, "n_layer": num_layers, "n_positions": 32}
        keys |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    else:
        keys |= {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
        keys |= {"num_hidden_layers": num_layers, "max_position_embeddings": 32, "rms_norm_eps": 1e-5}
        keys |= {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    keys |= {
        "mistral": {"sliding_window": 8, "head_dim": 16},
        "qwen3": {"head_dim": 32},
        "mixtral": {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    }.get(family, {})
    return AutoConfig.for_model(family, **{**keys, **shape})


def spec_model(family: str, folder: Path, num_layers: int = 3, layers: str | None = None) -> str:
    """The override that makes the model of a spec that of `small_config`, starting from `folder`."""
    listed = f", layers: '{layers}'" if layers else ""
    return (
        f"model={{family: {family}, num_layers: {num_layers}, hidden_size: 64, num_attention_heads: 4"
        f"{SPEC_SHAPES[family]}, max_position_embeddings: 32, init: {{kind: pretrained, name: '{folder}'{listed}}}}}"
    )


def write_model(folder: Path, config: PretrainedConfig, shard_bytes: int = SHARD_BYTES) -> PreTrainedModel:
    """A model of random weights, no two alike, as transformers saves it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim < 2 else 0.0, 0.05)  # norms and biases too: each is known again
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return model.eval()


def write_tokenizer(folder: Path, num_tokens: int) -> None:
    """A tokenizer of whole words beside a model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": number for number in range(num_tokens)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def origins(names: list[str], blocks: str, layers: list[int]) -> dict[str, str]:
    """For each parameter of a model that has `layers` of a source with parameters `names`: the source's."""
    found = {name: name for name in names if not name.startswith(f"{blocks}.")}
    for number, old in enumerate(layers):
        rest = [name.removeprefix(f"{blocks}.{old}.") for name in names if name.startswith(f"{blocks}.{old}.")]
        found |= {f"{blocks}.{number}.{name}": f"{blocks}.{old}.{name}" for name in rest}
    return found
