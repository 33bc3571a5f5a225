"""From the tensors of files to the parameters of a model, one parameter at a time.

Files may hold other names and other pieces than transformers' modules: without the prefix of the base model, or each
expert of a mixture by itself. What `from_pretrained` does about that to a whole model is done here for one parameter,
by the same rules (conversion_mapping.py and core_model_loading.py of transformers 5).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

Read = Callable[[str], torch.Tensor]


@dataclass
class Group:
    """Tensors of files that together become one parameter, or a few."""

    first: str
    """The parameter, or the first of them."""
    rule: WeightTransform
    """What makes it of them: a new name, or an operation."""
    pieces: list[tuple[str, str]] = field(default_factory=list)
    """Each one's name in its file, and the pattern of the rule that it fits."""


class Conversion:
    """Which tensors of files make which parameters of a model, and of what shape."""

    def __init__(self, skeleton: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> None:
        """`skeleton` is the model without memory, `shapes` what the files hold, by its name there."""
        rules = get_model_conversion_mapping(skeleton)
        self._skeleton = skeleton
        self._parameters = skeleton.state_dict()
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.unused: list[str] = []
        """Names in the files that become no parameter, and should have."""
        self._group_of: dict[str, Group] = {}
        self.shapes: dict[str, torch.Size] = {}
        """Of each parameter that can be made, by its name in the model."""
        self.groups = self._groups(shapes)
        # Every operation is tried without memory, which tells what it makes.
        for group in self.groups:
            made = self._convert(group, lambda name: torch.empty(shapes[name], device="meta"))
            self.shapes |= {name: tensor.shape for name, tensor in made.items()}
            self._group_of |= dict.fromkeys(made, group)
        self._last: dict[str, torch.Tensor] = {}

    def make(self, name: str, read: Read) -> torch.Tensor:
        """The parameter `name`, of what `read` gives for the names of its pieces."""
        if name not in self._last:
            # Of a group that becomes several parameters the others are kept, because they are asked for next.
            self._last = self._convert(self._group_of[name], read)
        return self._last.pop(name)

    def parameter_of(self, piece: str) -> str:
        """The first parameter that the tensor `piece` of a file becomes, or would; its own name where it is none."""
        return self._target(piece)[0]

    def _target(self, piece: str) -> tuple[str, str | None]:
        prefix = self._skeleton.base_model_prefix
        name, pattern = rename_source_key(piece, self._renamings, self._converters, prefix, self._parameters)
        return (piece, None) if name not in self._parameters and piece in self._parameters else (name, pattern)

    def _groups(self, shapes: Mapping[str, torch.Size]) -> list[Group]:
        converter_of = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        ignored = [*(self._skeleton._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
        groups: dict[str, Group] = {}
        for piece in sorted(shapes, key=dot_natural_key):
            name, pattern = self._target(piece)
            if name in self._parameters:
                rule = converter_of[pattern] if pattern else WeightRenaming(piece, name)
                groups.setdefault(name, Group(name, rule)).pieces.append((piece, pattern or piece))
            elif not any(re.search(known, name) for known in ignored):
                self.unused.append(piece)
        return list(groups.values())

    def _convert(self, group: Group, read: Read) -> dict[str, torch.Tensor]:
        rule = deepcopy(group.rule)
        for piece, pattern in group.pieces:
            rule.add_tensor(group.first, piece, pattern, lambda piece=piece: read(piece))
        made = rule.convert(group.first, model=self._skeleton, config=self._skeleton.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
