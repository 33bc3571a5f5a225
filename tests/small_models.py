"""Small models in folders that transformers wrote, to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

SHARD_BYTES = 100_000
"""So small that every model has several files."""


def small_config(family: str, num_layers: int = 3, vocab_size: int = 500, **shape: Any) -> PretrainedConfig:
    """Width 64, 4 heads, 32 positions; llama with 2 key-value heads and tied as dsllm's default is."""
    common = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        common |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(**{**common, "n_embd": 64, "n_head": 4, "n_layer": num_layers, "n_positions": 32, **shape})
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    sizes |= {"num_hidden_layers": num_layers, "max_position_embeddings": 32, "rms_norm_eps": 1e-5}
    return LlamaConfig(**{**common, **sizes, "tie_word_embeddings": True, **shape})


def write_model(folder: Path, config: PretrainedConfig, shard_bytes: int = SHARD_BYTES) -> PreTrainedModel:
    """A model of random weights, no two alike, as transformers saves it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim < 2 else 0.0, 0.05)  # norms and biases too: each is known again
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return model.eval()
