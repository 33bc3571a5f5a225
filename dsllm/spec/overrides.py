"""`--set section.key=value`: any field of a spec, from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from dsllm.errors import UserError
from dsllm.spec.schema import children, field_paths, known_keys, spec_schema, suggestion
from dsllm.spec.yaml_text import parse_yaml

Key = str | int


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A copy of the mapping with every `a.b=value` applied in order, and a sentence for each that could not be.

    The value is YAML, so that `--set optimizer.betas=[0.9,0.99]` works; a number in the path counts list items from 0.
    """
    result = deepcopy(mapping)
    problems = []
    for override in overrides:
        try:
            _apply(result, override)
        except UserError as error:
            problems.append(str(error))
    return result, problems


def _apply(mapping: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise UserError(f"--set {override}: an override is path=value; for example --set batch.micro_batch_size=4")
    keys = [_key(part) for part in path.strip().split(".")]
    _check_path(keys, f"--set {path.strip()}")
    _assign(mapping, keys, parse_yaml(text, f"--set {path.strip()}"), f"--set {path.strip()}")


def _key(part: str) -> Key:
    return int(part) if part.isdecimal() else part


def _check_path(keys: list[Key], source: str) -> None:
    """Refuses a path that no spec has, and names the nearest that one has."""
    nodes = [spec_schema()]
    for depth, key in enumerate(keys):
        below = [child for node in nodes for child in children(node, key)]
        if not below:
            parent = ".".join(map(str, keys[:depth]))
            raise UserError(f"{source}: unknown key '{key}'; {_advice(str(key), parent, known_keys(nodes))}")
        nodes = below


def _advice(key: str, parent: str, siblings: list[str]) -> str:
    """The suggestion with whole paths, since that is what `--set` takes."""
    advice = suggestion(key, parent, siblings)
    name = advice.removeprefix("did you mean ").removesuffix("?")
    full = f"{parent}.{name}"
    return f"did you mean {full}?" if parent and full in set(field_paths()) else advice


def _assign(mapping: dict[str, Any], keys: list[Key], value: Any, source: str) -> None:
    """Sets the value in nested mappings and lists; sections that are absent or null are made."""
    here: Any = mapping  # a dict or a list, at every depth
    key: Any
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        if isinstance(here, list) and not (isinstance(key, int) and key < len(here)):
            raise UserError(f"{source}: no item '{key}'; the list has {len(here)}, counted from 0")
        if not isinstance(here, dict | list):
            raise UserError(f"{source}: nothing can be set below a plain value; set the whole section instead")
        if following is None:
            here[key] = value
        elif isinstance(here, dict) and here.get(key) is None:
            if isinstance(following, int):
                raise UserError(f"{source}: the spec has no such list; set it whole, as --set a.b=[...]")
            here[key] = {}
        here = here[key]
