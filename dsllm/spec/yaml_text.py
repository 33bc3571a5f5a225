"""YAML and JSON as specs are written: safe, with YAML 1.2's numbers, and without duplicate keys.

PyYAML reads YAML 1.1, where `20e9` and `2e-4` are text, `12:30` is 750 and `off` is false. The tables below keep its
safe loader and dumper but resolve plain scalars as YAML 1.2 does (https://yaml.org/spec/1.2.2/, section 10.3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from dsllm.errors import UserError, one_line

_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Tag and pattern by first character, the form in which PyYAML looks them up; the first match wins."""
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first_characters in _SCALARS:
        for character in first_characters:
            table.setdefault(character, []).append((f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$")))
    return table


def _number(text: str) -> int | float:
    """A number as written; `20e9` is whole, so that it can count tokens."""
    value = float(text)
    return int(value) if "e" in text.lower() and value.is_integer() else value


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node).replace("_", ""))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> int | float:
        text = self.construct_scalar(node).replace("_", "").lower()
        return float(text.replace(".", "")) if "inf" in text or "nan" in text else _number(text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                line = key_node.start_mark.line + 1
                raise yaml.MarkedYAMLError(problem=f"key '{key}' is given twice; keep one (line {line})")
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()  # text that reads as a number in YAML 1.2 is quoted


def parse_yaml(text: str, source: str) -> Any:
    """The value that a YAML document holds. Raises UserError, naming the source, for text that is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise UserError(f"{source}: not valid YAML: {error.problem}{mark}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid YAML: {one_line(error)}") from error


def parse_json(text: str, source: str) -> Any:
    """The value that a JSON document holds. Raises UserError, naming the source, for text that is not JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            twice = next(key for key in mapping if sum(key == other for other, _ in pairs) > 1)
            raise UserError(f"{source}: not valid JSON: key '{twice}' is given twice; keep one")
        return mapping

    try:
        return json.loads(text, parse_float=_number, object_pairs_hook=unique)
    except ValueError as error:
        raise UserError(f"{source}: not valid JSON: {error}") from error


def read_document(path: Path, source: str) -> Any:
    """The value in a YAML file, or in a JSON file whose name ends in `.json`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from error
    return parse_json(text, source) if path.suffix == ".json" else parse_yaml(text, source)


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads back as an equal value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
