"""The sizes that rules between them read, of a spelled-out model and of a configuration that a formula knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsllm.spec.config_keys import known_keys, wrong_keys
from dsllm.spec.derived import experts, written_config

if TYPE_CHECKING:
    from dsllm.spec.sections import AnyModel, AutoModel, Model

FIELDS = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_size",
    "intermediate_size",
    "num_experts",
    "num_experts_per_token",
)
KEYS = {
    **{field: field for field in FIELDS},
    "head_size": "head_dim",
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
}
"""What configurations call each."""
GPT2_KEYS = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "intermediate_size": "n_inner"}


@dataclass(frozen=True)
class Sizes:
    """Of a network, None where the spec leaves them to follow; the two counts of experts are 0 in a dense family."""

    family: str
    section: str
    """Where the sizes are written: `model`, or `model.config`."""
    names: Mapping[str, str]
    """What each size is called there."""
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int | None
    head_size: int | None
    intermediate_size: int | None
    num_experts: int
    num_experts_per_token: int

    def given(self, field: str) -> str:
        """`model.hidden_size: given 64`: how a sentence about a field begins."""
        return f"{self.section}.{self.names[field]}: given {getattr(self, field)}"


def sizes_of(model: AnyModel) -> Sizes | None:
    """None for a configuration that has yet to be read, is wrong, or is of a type that no formula knows."""
    return _of_config(model) if model.family == "auto" else _of_fields(model)


def _of_fields(model: Model) -> Sizes:
    num_experts, chosen = experts(model)
    sizes: dict[str, Any] = {field: getattr(model, field) for field in FIELDS}
    sizes |= {"num_experts": num_experts, "num_experts_per_token": chosen}
    return Sizes(family=model.family, section="model", names={field: field for field in FIELDS}, **sizes)


def _of_config(model: AutoModel) -> Sizes | None:
    config = written_config(model)
    keys = known_keys(config)
    if keys is None or any(wrong_keys(config)):
        return None
    family: str = keys["model_type"]
    names = {**KEYS, **(GPT2_KEYS if family == "gpt2" else {})}
    sizes: dict[str, Any] = {field: keys.get(name) for field, name in names.items()}
    if family != "mixtral":
        sizes |= {"num_experts": 0, "num_experts_per_token": 0}
    return Sizes(family=family, section="model.config", names=names, **sizes)
