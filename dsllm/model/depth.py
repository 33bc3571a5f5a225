"""A model of another depth: which layers of an existing one it has, and its configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dsllm.errors import UserError
from dsllm.spec.layers import config_with_layers


def with_layers(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model that has `layers` of the one that `config` describes, in that order."""
    return type(config).from_dict(config_with_layers(config.to_dict(), layers))


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
