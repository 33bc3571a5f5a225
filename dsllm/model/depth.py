"""A model of another depth: which layers of an existing one it has, and its configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dsllm.errors import UserError
from dsllm.spec.layers import layer_numbers, parse_layers


def chosen_layers(text: str, field: str, config: PretrainedConfig, name: str) -> tuple[int, ...]:
    """The layers that `text`, the value of the field or option `field`, lists of the model `name`, in order.

    Raises UserError where the list is malformed, or names layers that the model has not.
    """
    layers, depth = layer_numbers(parse_layers(text, field)), config.num_hidden_layers
    outside = [layer for layer in layers if layer >= depth]
    if outside:
        raise UserError(
            f"{field}: given '{text}', with layer {outside[0]}; {name} has layers 0 to {depth - 1}; name those"
        )
    return layers


def with_layers(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model that has `layers` of the one that `config` describes, in that order: its depth, and
    what it says of each layer."""
    depth, common = config.num_hidden_layers, PretrainedConfig().to_dict()
    document = config.to_dict()
    for key, value in document.items():
        is_of_layers = isinstance(value, list | tuple) and len(value) == depth
        if is_of_layers and key not in common and not key.endswith("token_id"):
            document[key] = [value[layer] for layer in layers]
    document[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    return type(config).from_dict(document)


def blocks_name(model: PreTrainedModel) -> str:
    """Name of the list of a model's layers, as `model.layers`. Raises UserError where there is none, or several."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == model.config.num_hidden_layers
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    ]
    if len(names) != 1:
        raise UserError(
            f"{model.config.model_type}: a model of this type has {len(names)} lists of layers, and from which one "
            "to take them must be clear; take the model as it is"
        )
    return names[0]
