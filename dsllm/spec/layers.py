"""Which layers of an existing model become those of a new one: `0-7,4-11` is the first 8 and the last 8 of 12."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from dsllm.errors import UserError

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names that configurations of transformers have for their number of layers."""
NOT_OF_LAYERS = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id")
"""Lists of a configuration that may be as long by chance."""
ALIKE = ("gpt2", "gpt_neox", "llama", "mistral", "mixtral", "qwen2", "qwen3")
"""Model types whose layers are alike, but for the windows of Qwen: of others transformers may derive from the number of
a layer what it is."""
_RANGE = re.compile(r"(?P<first>\d{1,4})(?:-(?P<last>\d{1,4}))?")


def parse_layers(text: str, name: str) -> tuple[range, ...]:
    """The ranges of a list such as `0-7,4-11`, in its order; a layer by itself is a range of one.

    Raises UserError, which begins with the field or option `name`, for anything else, and for a range that goes down.
    """
    matches = [_RANGE.fullmatch(part.strip()) for part in text.split(",")]
    ranges = []
    for match in matches:
        if match is None:
            raise UserError(f"{name}: given '{text}'; must be ranges of layers, counted from 0, such as 0-7,4-11")
        first, last = int(match["first"]), int(match["last"] or match["first"])
        if last < first:
            raise UserError(
                f"{name}: given '{text}', where {match[0]} goes down; layers of a range go up; write {last}-{first}, "
                "or each layer by itself to turn their order round"
            )
        ranges.append(range(first, last + 1))
    return tuple(ranges)


def layer_numbers(ranges: tuple[range, ...]) -> tuple[int, ...]:
    """The layers of all ranges, in order: which one of the source each layer of the new model is."""
    return tuple(chain.from_iterable(ranges))


def chosen_layers(text: str, name: str, depth: int, model: str) -> tuple[int, ...]:
    """The layers that `text`, the value of the field or option `name`, lists of `model`, which has `depth`, in order.

    Raises UserError where the list is malformed, or names layers that the model has not.
    """
    layers = layer_numbers(parse_layers(text, name))
    outside = [layer for layer in layers if layer >= depth]
    if outside:
        raise UserError(
            f"{name}: given '{text}', with layer {outside[0]}; {model} has layers 0 to {depth - 1}; name those"
        )
    return layers


def config_with_layers(keys: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The keys of the configuration of a model that has `layers` of the one that `keys` describe, in that order: its
    depth, and what is said of each layer."""
    depth_key = depth_key_of(keys)
    chosen = {
        key: [value[layer] for layer in layers]
        for key, value in keys.items()
        if is_of_layers(key, value, keys[depth_key])
    }
    return {**keys, **chosen, depth_key: len(layers)}


def says_all_of_layers(keys: Mapping[str, Any]) -> bool:
    """Whether layers can be taken from a configuration as it is written, without transformers."""
    has_windows = keys.get("use_sliding_window") and not keys.get("layer_types")
    return keys.get("model_type") in ALIKE and not has_windows


def is_of_layers(key: str, value: object, depth: int) -> bool:
    """Whether the value of a configuration's key says something of each layer."""
    return isinstance(value, list | tuple) and len(value) == depth and key not in NOT_OF_LAYERS


def depth_key_of(keys: Mapping[str, Any]) -> str:
    """The name that a configuration has for its number of layers. Raises UserError where it has none of the known."""
    names = [name for name in DEPTH_KEYS if isinstance(keys.get(name), int)]
    if not names:
        raise UserError(
            f"model.init.layers: the config.json of the model does not say how many layers it has, by none of "
            f"{', '.join(DEPTH_KEYS)}; add it there"
        )
    return names[0]
