"""Hypothesis strategies for valid specs, made to keep the rules rather than filtered by them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from dsllm.spec.load import parse_spec
from dsllm.spec.sections import Spec

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral")

positive = st.floats(min_value=1e-12, max_value=1e12, allow_subnormal=False)
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@st.composite
def models(draw: st.DrawFn, positions: int) -> dict[str, Any]:
    family = draw(st.sampled_from(FAMILIES))
    groups, heads_per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    heads = groups * heads_per_group
    model: dict[str, Any] = {
        "family": family,
        "num_layers": draw(st.integers(1, 100)),
        "num_attention_heads": heads,
        "hidden_size": heads * 2 * draw(st.integers(1, 64)) * (4 if family == "mixtral" else 1),
        "max_position_embeddings": positions,
        "tie_word_embeddings": draw(st.booleans()),
        "norm_epsilon": draw(positive),
    }
    if family == "gpt2":
        return {**model, "dropout": draw(st.floats(min_value=0, max_value=0.9))}
    model |= {"num_key_value_heads": groups, "rope_theta": draw(positive)}
    if family != "qwen2":
        model["head_size"] = draw(st.none() | st.integers(1, 64).map(lambda half: 2 * half))
    if family in ("mistral", "mixtral"):
        model["sliding_window"] = draw(st.none() | st.integers(1, 4096))
    if family == "mixtral":
        experts = draw(st.integers(2, 16))
        chosen = draw(st.integers(2, experts))
        model |= {"num_experts": experts, "num_experts_per_token": chosen, "balance_loss_weight": draw(positive)}
    return model


@st.composite
def zeros(draw: st.DrawFn) -> dict[str, Any]:
    stage = draw(st.integers(0, 3))
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero["offload_optimizer"] = draw(st.sampled_from(["none", "cpu", "nvme"] if stage == 3 else ["none", "cpu"]))
    if stage == 3:
        zero["offload_param"] = draw(st.sampled_from(["none", "cpu", "nvme"]))
        zero["max_live_elements"] = draw(st.none() | st.integers(1, 10**9))
    if "nvme" in zero.values():
        zero["nvme_path"] = draw(text)
    return zero


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """A mapping as YAML would give it."""
    sequence_length = draw(st.integers(1, 4096))
    micro_batch_size = draw(st.integers(1, 16))
    zero = draw(zeros())
    return {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "model": draw(models(sequence_length + draw(st.integers(0, 100)))),
        "tokenizer": draw(
            st.sampled_from(
                [
                    {"kind": "pretrained", "name": "gpt2"},
                    {"kind": "sentencepiece", "vocab_size": 300, "algorithm": "unigram"},
                    {"kind": "bpe", "vocab_size": 8192},
                ]
            )
        ),
        "data": {
            "sources": [
                {"kind": "text", "path": draw(text), "weight": draw(positive)},
                {"kind": "python-stdlib", "weight": draw(positive)},
            ],
            "mask_documents": draw(st.booleans()),
            "directory": draw(st.none() | text),
        },
        "batch": {
            "sequence_length": sequence_length,
            "global_batch_size": micro_batch_size * draw(st.integers(1, 64)),
            "micro_batch_size": draw(st.sampled_from(["auto", micro_batch_size])),
        },
        "training": {
            "tokens": draw(st.integers(1, 10**13)),
            "precision": draw(st.sampled_from(["bf16", "fp16", "fp32"])),
            "activation_checkpointing": draw(st.sampled_from(["none", "selective", "full"])),
        },
        "optimizer": {"learning_rate": draw(positive), "betas": [draw(st.floats(0, 0.999)), 0.95]},
        "zero": zero,
        "launch": {"environment": draw(st.lists(st.from_regex(r"[A-Za-z_*?][A-Za-z0-9_*?]{0,9}", fullmatch=True)))},
        "logging": draw(st.sampled_from([{}, {"wandb": None}, {"wandb": {"mode": "offline"}}])),
    }


specs: st.SearchStrategy[Spec] = documents().map(parse_spec)
