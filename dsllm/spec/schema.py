"""The spec's JSON Schema, and small questions to it: what may stand at a place, and which keys are near."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from dsllm.spec.sections import Spec

Node = dict[str, Any]

TAGS = ("kind", "family")
"""Keys that say which member of a union a section is."""


@cache
def spec_schema() -> Node:
    """JSON Schema (draft 2020-12) of a spec; editors complete and check a YAML file with it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Spec.model_json_schema(),
        "title": "dsllm spec",
    }


def variants(node: Node) -> list[Node]:
    """The node with references followed and unions taken apart: one node for a plain field."""
    if "$ref" in node:
        target = spec_schema()["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        # a field's own description stands beside the reference and goes before that of its type
        return [{**target, **{key: value for key, value in node.items() if key != "$ref"}}]
    members = node.get("oneOf") or node.get("anyOf")
    return [variant for member in members for variant in variants(member)] if members else [node]


def children(node: Node, key: str | int) -> list[Node]:
    """What may stand under `key` of a node: nothing where no such key or position exists."""
    found: list[Node] = []
    for variant in variants(node):
        if isinstance(key, str) and key in variant.get("properties", {}):
            found.append(variant["properties"][key])
        elif isinstance(key, str) and variant.get("additionalProperties") is True:
            found.append({})
        if isinstance(key, int) and "items" in variant:
            found.append(variant["items"])
        if isinstance(key, int) and key < len(variant.get("prefixItems", ())):
            found.append(variant["prefixItems"][key])
    return found


def tag_of(parts: Sequence[Node]) -> str | None:
    """The key by which the members of a union are told apart; None where they are not all sections with one."""
    return next((tag for tag in TAGS if all(tag in part.get("properties", ()) for part in parts)), None)


def tag_values(parts: Sequence[Node], tag: str) -> list[str]:
    """What may stand under the tag, over all members."""
    fields = [part["properties"][tag] for part in parts]
    return [value for field in fields for value in field.get("enum", [field.get("const")])]


def known_keys(nodes: Sequence[Node]) -> list[str]:
    """Keys that may stand in any of the nodes, in the order of the sections."""
    return list(dict.fromkeys(key for node in nodes for part in variants(node) for key in part.get("properties", ())))


def field_paths(node: Node | None = None, prefix: str = "") -> Iterator[str]:
    """Dotted paths of every field of the spec outside lists, sections included."""
    for variant in variants(spec_schema() if node is None else node):
        for key, child in variant.get("properties", {}).items():
            yield prefix + key
            yield from field_paths(child, f"{prefix}{key}.")


def suggestion(key: str, parent: str, siblings: Sequence[str]) -> str:
    """How to go on from an unknown key: the nearest sibling, else the same name elsewhere, else all siblings."""
    from difflib import get_close_matches  # only ever needed on the way to an error

    near = get_close_matches(key, siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    leaves = {path.rpartition(".")[2]: path for path in field_paths() if path.rpartition(".")[0] != parent}
    elsewhere = get_close_matches(key, leaves, n=1, cutoff=0.8)
    if elsewhere:
        return f"did you mean {leaves[elsewhere[0]]}?"
    return f"known are {', '.join(siblings)}" if siblings else "it holds no keys"


def describe(node: Node) -> str:
    """What a field wants, in words: `a whole number greater than 0, or auto`."""
    parts = variants(node)
    if len(parts) > 1 and (tag := tag_of(parts)) is not None:
        return f"a section whose {tag} is one of {', '.join(tag_values(parts, tag))}"
    return ", or ".join(_describe_variant(part) for part in parts)


def _describe_variant(node: Node) -> str:
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}"
    kind = node.get("type")
    if kind == "object" and "properties" not in node:
        return "a mapping"
    if kind == "object":
        return f"a section with {', '.join(node.get('required') or node['properties'])}"
    if kind == "array":
        return _describe_list(node)
    if kind == "string":
        return _describe_text(node)
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    return words[str(kind)] + _describe_bounds(node)


def _describe_list(node: Node) -> str:
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])}, each {describe(node['prefixItems'][0])}"
    return f"a list of {node.get('minItems', 0)} or more, each {describe(node['items'])}"


def _describe_text(node: Node) -> str:
    limit = f" of at most {node['maxLength']} characters" if "maxLength" in node else ""
    return f"text{limit}" + (f" that matches {node['pattern']}" if "pattern" in node else "")


def _describe_bounds(node: Node) -> str:
    if "minimum" in node and "maximum" in node:
        return f" from {node['minimum']:g} to {node['maximum']:g}"
    phrases = {
        "exclusiveMinimum": "greater than",
        "minimum": "at least",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    bounds = [f"{phrase} {node[key]:.12g}" for key, phrase in phrases.items() if key in node]
    return " " + " and ".join(bounds) if bounds else ""
