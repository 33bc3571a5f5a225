"""config.json, as Hugging Face models have it, in the place of the folder that a spec names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsllm.errors import UserError
from dsllm.spec.layers import chosen_layers, config_with_layers, depth_key_of, says_all_of_layers


def with_local_config(document: dict[str, Any]) -> dict[str, Any]:
    """A spec's mapping with the configuration of an automatic model written out, where that is in a local folder.

    A name that is no local path may be one on the Hub, which is asked where a run starts; so is transformers for what
    it derives from the number of a layer, where layers are listed. Raises UserError for a folder without a
    configuration, and for one that cannot be read.
    """
    model = document.get("model")
    source = _source(model) if isinstance(model, Mapping) and model.get("family") == "auto" else None
    if source is None or not Path(source).expanduser().exists():
        return document
    keys = read_config_file(source)
    if document["model"].get("config") is None:
        layers = document["model"]["init"].get("layers")
        if layers is not None and not says_all_of_layers(keys):
            return document
        keys = start_config(keys, layers, source)
    return {**document, "model": {**document["model"], "config": keys}}


def start_config(keys: dict[str, Any], layers: object, name: str) -> dict[str, Any]:
    """The configuration of a model that starts from the one that `keys` describe, `name`: with the `layers` that
    `model.init` lists. Raises UserError where the other has not so many."""
    if not isinstance(layers, str):  # none, or a mistake that the spec's own check tells
        return keys
    return config_with_layers(keys, chosen_layers(layers, "model.init.layers", keys[depth_key_of(keys)], name))


def read_config_file(source: str) -> dict[str, Any]:
    """The keys of a folder's config.json, or of that file itself; private ones left out."""
    path = Path(source).expanduser()
    file = path / "config.json" if path.is_dir() else path
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"model.config: given '{source}', a folder without a config.json; give a Hugging Face model's folder"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); a config.json is a JSON object") from error
    if not isinstance(keys, dict):
        raise UserError(f"{file}: given a {type(keys).__name__}; a config.json is a JSON object")
    return {key: value for key, value in keys.items() if not key.startswith("_")}


def _source(model: Mapping[str, Any]) -> str | None:
    """The folder or name that the configuration is to come from; None where it is written out, or a mistake."""
    config, init = model.get("config"), model.get("init")
    if config is None and isinstance(init, Mapping) and init.get("kind") == "pretrained":
        config = init.get("name")
    return config if isinstance(config, str) else None
