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


def refuse_other_layers(source: PreTrainedModel, model: PreTrainedModel, layers: Sequence[int], name: str) -> None:
    """Raises UserError where a layer of `model` is not made as that of `source`, the model `name`, which `layers` says
    it is: a dense one for one of experts, where the configuration tells them apart by their numbers."""
    theirs, ours = (_layers_of(each) for each in (source, model))
    for number, old in enumerate(layers):
        for one, other, has, lacks in (
            (theirs[old], ours[number], f"layer {old} of {name}", f"layer {number} of the new model"),
            (ours[number], theirs[old], f"layer {number} of the new model", f"layer {old} of {name}"),
        ):
            if differing := [part for part, shape in one.items() if other.get(part) != shape]:
                raise UserError(
                    f"{has} has {differing[0]} where {lacks} has none, or one of another size; list layers of one kind"
                )


def _layers_of(model: PreTrainedModel) -> list[dict[str, torch.Size]]:
    """The parameters of each layer, by their names within it."""
    blocks = model.get_submodule(blocks_name(model))
    return [{name: parameter.shape for name, parameter in block.named_parameters()} for block in blocks.children()]


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
