"""An existing model, open for reading: its configuration, and its weights one parameter at a time."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dsllm.errors import UserError, first_line
from dsllm.model.build import build_model
from dsllm.model.configs import check_is_causal
from dsllm.model.conversion import Conversion
from dsllm.model.source_files import Tensors, weight_files


class Source:
    """A model in a Hugging Face folder. Nothing is read before it is asked for, and nothing is kept."""

    def __init__(self, folder: Path, *, to_train: bool = True) -> None:
        """Raises UserError where configuration or weights are not there, damaged, or not of each other, and where they
        are what dsllm cannot train on, unless it is not `to_train`."""
        self.folder = folder
        self.config = read_config(folder)
        self.skeleton = build_skeleton(self.config, str(folder), to_train=to_train)
        self.files = weight_files(folder)
        self.tensors = Tensors(self.files)
        self.conversion = Conversion(self.skeleton, self.tensors.shapes)
        self._other_name = _other_names(self.skeleton, self.conversion)
        self._refuse_missing()
        self._refuse_misshapen()
        self._refuse_untied()

    def shape(self, name: str) -> torch.Size | None:
        """Of the parameter `name`; None where the source has no such parameter."""
        return self.conversion.shapes.get(self._other_name.get(name, name))

    def read(self, name: str) -> torch.Tensor:
        """The parameter `name` in the type that it has on disk, on the CPU."""
        return self.conversion.make(self._other_name.get(name, name), self.tensors.read)

    def _refuse_missing(self) -> None:
        names = [*dict(self.skeleton.named_parameters()), *_state_beside_weights(self.skeleton)]
        missing = [name for name in names if self.shape(name) is None]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of its model's {len(names)} weights are not in its files, first "
                f"{missing[0]}; complete the folder, or take the model's whole one"
            )

    def _refuse_misshapen(self) -> None:
        for name, parameter in self.skeleton.named_parameters():
            if (found := self.shape(name)) != parameter.shape:
                raise UserError(
                    f"{self.folder}: {name} is {by(found)} where its config.json means {by(parameter.shape)}; bring "
                    "the two together from one model"
                )

    def _refuse_untied(self) -> None:
        """Where the configuration ties two parameters, files may hold both: as one, or they are of another model."""
        for one, other in self.skeleton.all_tied_weights_keys.items():
            if one in self.conversion.shapes and other in self.conversion.shapes:
                first, second = (self.conversion.make(name, self.tensors.read) for name in (one, other))
                if not torch.equal(first, second):
                    raise UserError(
                        f"{self.folder}: its config.json ties {one} to {other}, and its files hold different weights "
                        "for the two; set tie_word_embeddings to false in its config.json"
                    )


def read_config(folder: Path, *, to_train: bool = True) -> PretrainedConfig:
    """The configuration in a folder. Raises UserError for one that transformers does not know, or, `to_train`, of
    weights that are quantised."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds: damaged JSON, a type it does not know, code that would have to run
        raise UserError(
            f"{folder}: transformers cannot read its config.json ({first_line(error)}); copy it again where it is "
            "damaged, or give a model of a type that this version of transformers has"
        ) from error
    if to_train and is_quantised(config):
        raise UserError(
            f"{folder}: its weights are quantised, which cannot be trained on; give the model in bf16 or fp32"
        )
    return config


def is_quantised(config: PretrainedConfig) -> bool:
    """Whether the weights of a configuration are of a type that is no number by itself."""
    return getattr(config, "quantization_config", None) is not None


def build_skeleton(config: PretrainedConfig, name: str, *, to_train: bool = True) -> PreTrainedModel:
    """The model of a configuration without memory: names and shapes alone. Raises UserError where it is no causal
    language model, cannot be built or, `to_train`, is one beside others, or keeps state that training would not
    update."""
    check_is_causal(config, name)
    if to_train and config.get_text_config(decoder=True) is not config:
        raise UserError(
            f"{name}: its configuration holds others, as that of a model of text and images does, and dsllm trains the "
            "text model alone; give one of text"
        )
    try:
        with torch.device("meta"):
            skeleton = build_model(deepcopy(config), torch.float32)  # which writes the type into its configuration
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # whatever a type's own class stumbles over
        raise UserError(
            f"{name}: transformers builds no model of its config.json ({first_line(error)}); mend the key"
        ) from error
    if to_train and (state := _state_beside_weights(skeleton)):
        raise UserError(
            f"{name}: its models keep state beside their weights, {state[0]}, which dsllm does not train; "
            "choose another family"
        )
    return skeleton


def by(shape: Sequence[int]) -> str:
    """`(500, 64)` -> `500 x 64`."""
    return " x ".join(map(str, shape))


def _state_beside_weights(skeleton: PreTrainedModel) -> list[str]:
    """Buffers that belong to what a model has learned."""
    return sorted(skeleton.state_dict().keys() - dict(skeleton.named_parameters(remove_duplicate=False)).keys())


def _other_names(skeleton: PreTrainedModel, conversion: Conversion) -> dict[str, str]:
    """For each tied parameter that files hold by the name of its twin alone, that name."""
    tied = skeleton.all_tied_weights_keys.items()
    pairs = [*tied, *((other, one) for one, other in tied)]
    return {one: other for one, other in pairs if one not in conversion.shapes and other in conversion.shapes}
