"""Configurations of any model type of transformers: from a folder, the Hub or a spec, checked before they are built."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
)

from dsllm.errors import UserError, first_line, one_line
from dsllm.spec.config_file import read_config_file, start_config
from dsllm.spec.config_keys import NAMES_OF_OURS
from dsllm.spec.derived import config_source, written_config
from dsllm.spec.layers import depth_key_of, is_of_layers
from dsllm.spec.load import load_spec
from dsllm.spec.sections import AutoModel, Spec

WRITTEN_BY_TRANSFORMERS = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
"""Keys of a config.json that say nothing of the network."""
OLDER_NAMES = ("rope_theta", "rope_scaling")
"""Read still, into `rope_parameters`."""


def with_written_config(spec: Spec, run_spec: Path | None = None) -> Spec:
    """The spec with the configuration of its model written out, so that it no longer needs the folder, or the name on
    the Hub, that it was given: itself, where that is so already.

    Where that cannot be had any more, it is the one in the spec of the run so far, the file `run_spec`. Raises
    UserError where there is no such configuration, and SpecError where it does not suit the rest of the spec.
    """
    model = spec.model
    if model.family != "auto" or isinstance(model.config, dict):
        return spec
    name, revision = config_source(model)
    document = spec.model_dump()
    try:
        keys = read_config(name, revision)
        if model.config is None and model.init.kind == "pretrained" and model.init.layers is not None:
            keys = start_config(_with_derived_layers(keys, name), model.init.layers, name)
    except UserError:
        earlier = _written_config_of(run_spec)
        if earlier is None:
            raise
        keys = earlier
    document["model"]["config"] = keys
    return Spec.model_validate(document)


def _with_derived_layers(keys: dict[str, Any], name: str) -> dict[str, Any]:
    """With what transformers derives of each layer from its number, which is another one in the new model."""
    depth = keys[depth_key_of(keys)]
    whole = auto_config(keys, name).to_dict()
    derived = {key: value for key, value in whole.items() if is_of_layers(key, value, depth) and not keys.get(key)}
    return {**keys, **derived}


def _written_config_of(run_spec: Path | None) -> dict[str, Any] | None:
    """Of the automatic model of a run's spec; None where there is no such thing."""
    model = load_spec(str(run_spec)).model if run_spec is not None and run_spec.is_file() else None
    return (written_config(model) or None) if isinstance(model, AutoModel) else None


def read_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """The keys of the config.json in a folder, or of a model on the Hub.

    Raises UserError where there is none.
    """
    if Path(name).expanduser().exists():
        return read_config_file(name)
    try:
        keys, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.config: given '{name}': no folder with a config.json, and no model on the Hub that can be read now "
            f"({first_line(error)}); check the name, or the network"
        ) from error
    return {key: value for key, value in keys.items() if not key.startswith("_")}


def auto_config(keys: dict[str, Any], source: str = "model.config") -> PretrainedConfig:
    """The configuration that `keys` describe, `model_type` among them.

    Raises UserError for a type that transformers does not have or that is no decoder, for a key that is nearly one of
    the type's, and for values that the type refuses.
    """
    model_type = keys.get("model_type")
    if model_type not in CONFIG_MAPPING:
        given = "missing" if model_type is None else f"given {model_type!r}"
        raise UserError(
            f"{source}.model_type: {given}; must be a type that this transformers has; {_nearest_types(model_type)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    _check_keys(keys, config_class(), source)
    try:
        config = config_class.from_dict({key: value for key, value in keys.items() if key != "torch_dtype"})
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{source}: transformers takes it for no {model_type} ({one_line(error)}); correct the key"
        ) from error
    check_is_causal(config, source)
    return config


def check_is_causal(config: PretrainedConfig, source: str) -> None:
    """Raises UserError for a configuration of what does not predict the next token."""
    is_known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if not is_known or is_encoder or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{source}: model type {config.model_type} is no decoder that predicts the next token; "
            "give the config of a causal language model"
        )


def num_experts(config: PretrainedConfig) -> int:
    """By any of the names that model types have for it; 0 where all tokens take the same feed-forward layer."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((count for name in names if (count := getattr(config, name, None))), 0)


def _nearest_types(model_type: Any) -> str:
    if model_type is None:
        return "for example llama"
    near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "for example llama"


def _check_keys(keys: dict[str, Any], default: PretrainedConfig, source: str) -> None:
    """transformers never looks at a key that it does not know, nor at one of two names for a thing: refused where the
    key is nearly another or one of a spelled-out model's, or the two differ. What is false or null says nothing."""
    aliases = default.attribute_map
    known = {*default.to_dict(), *aliases, *WRITTEN_BY_TRANSFORMERS, *OLDER_NAMES}
    for key, value in keys.items():
        own = aliases.get(key, key)
        if keys.get(own, value) != value:
            raise UserError(
                f"{source}.{key}: given {value} beside {own} {keys[own]}, which is {keys['model_type']}'s name for it; "
                "keep one"
            )
        if key in known or value is False or value is None:
            continue
        ours = [name for name in NAMES_OF_OURS.get(key, ()) if name in known]
        near = ours or difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if near:
            raise UserError(f"{source}.{key}: no key of {keys['model_type']}; did you mean {near[0]}?")
