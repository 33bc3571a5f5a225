"""What each parameter of a run's model gets from an existing one: its layers in any order, its vocabulary grown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dsllm.errors import UserError
from dsllm.model.build import model_config
from dsllm.model.depth import blocks_name, refuse_other_layers, with_layers
from dsllm.model.same_network import refuse_another_network
from dsllm.model.source import Source, build_skeleton, by
from dsllm.model.source_files import find_folder
from dsllm.model.source_tokenizer import tokens_by_id
from dsllm.model.suitability import check_suitable
from dsllm.model.vocabulary_rows import VocabularyRows, vocabulary_rows
from dsllm.spec.layers import chosen_layers
from dsllm.spec.sections import Pretrained, Spec


class CarryOver:
    """The plan by which weights of a source become those of a model, made before a single one is read."""

    def __init__(
        self, source: Source, config: PretrainedConfig, layers: Sequence[int] | None, rows: VocabularyRows
    ) -> None:
        """`config` is that of the model. `layers` are those of the source that the model has, in order; all when None.

        Raises UserError where a parameter of the model cannot be had from the source.
        """
        self.source = source
        self.rows = rows
        self._layers = layers
        self._blocks = blocks_name(source.skeleton) if layers is not None else ""
        target = build_skeleton(config, "model")
        if layers is not None:
            refuse_other_layers(source.skeleton, target, layers, str(source.folder))
        self._vocabulary = _vocabulary_names(target)
        self._positions = _embedding_names(target) - self._vocabulary
        for name, parameter in target.named_parameters():
            self._refuse_unfit(name, parameter.shape)

    def set_num_tokens(self, num_tokens: int) -> None:
        """Tell how many tokens the run's tokenizer has, where that is less than the model can hold."""
        self.rows = replace(self.rows, num_tokens=num_tokens, num_known=min(num_tokens, self.rows.num_known))

    def fill(self, name: str, parameter: torch.Tensor) -> None:
        """Set the whole `parameter` of that name, in place, in its own type."""
        value = self.source.read(self.source_name(name))
        with torch.no_grad():
            if name in self._vocabulary:
                self.rows.fill(parameter, value)
            else:
                parameter.copy_(value[: len(parameter)])

    def source_name(self, name: str) -> str:
        """The source's parameter that the model's parameter `name` is made of."""
        if self._layers is None or not name.startswith(f"{self._blocks}."):
            return name
        number, _, rest = name.removeprefix(f"{self._blocks}.").partition(".")
        return f"{self._blocks}.{self._layers[int(number)]}.{rest}"

    def _refuse_unfit(self, name: str, shape: torch.Size) -> None:
        origin, folder = self.source_name(name), self.source.folder
        theirs = self.source.shape(origin)
        if theirs is None:
            raise UserError(f"{folder}: it has no {origin}, of which {name} would be made; take a model that has it")
        if name in self._positions and shape[0] > theirs[0]:
            raise UserError(
                f"model.max_position_embeddings: given {shape[0]}; {folder} has learned {theirs[0]} positions, and no "
                f"more can be had; set it to {theirs[0]} or less"
            )
        cut = 1 if name in self._vocabulary or name in self._positions else 0
        if shape[cut:] != theirs[cut:]:
            raise UserError(
                f"{folder}: {origin} is {by(theirs)}, and {name} of the model is to be {by(shape)}; give the spec the "
                "model's own sizes"
            )


def open_carry_over(spec: Spec, init: Pretrained) -> tuple[CarryOver, dict[int, str] | None]:
    """The model of `init`, found to fit the spec's; and the tokens that it knows, None where it has no tokenizer.

    Nothing is downloaded: ranks wait for this. Raises UserError, SpecError where it is another network, or an automatic
    one that dsllm cannot train.
    """
    source = Source(find_folder(init.name, init.revision, may_download=False))
    layers, theirs = None, source.config
    if init.layers is not None:
        layers = chosen_layers(init.layers, "model.init.layers", source.config.num_hidden_layers, init.name)
        theirs = with_layers(source.config, layers)
    config = model_config(spec)
    if spec.model.family == "auto":
        check_suitable(config, spec.zero.stage, spec.data.mask_documents)
    refuse_another_network(spec.model, config, theirs, init.name)
    tokens = tokens_by_id(source.folder)
    num_known = None if tokens is None else 1 + max(tokens)
    rows = vocabulary_rows(num_known, spec.vocab_size, source.config.vocab_size, config.vocab_size, init.name)
    return CarryOver(source, config, layers, rows), tokens


def _vocabulary_names(model: PreTrainedModel) -> set[str]:
    """Parameters with a row for each token: the embedding and, where it is not the same, the output projection."""
    tables = {id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    return {name for name, parameter in model.named_parameters() if id(parameter) in tables}


def _embedding_names(model: PreTrainedModel) -> set[str]:
    """Tables of tokens and of learned positions."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
