"""What Pydantic finds wrong with a spec, in sentences: the field, what was given, what it must be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dsllm.spec.schema import (
    Node,
    children,
    describe,
    known_keys,
    spec_schema,
    suggestion,
    tag_of,
    tag_values,
    variants,
)


class Place(NamedTuple):
    """A field as the user knows it, without Pydantic's labels of union members."""

    keys: tuple[str | int, ...]
    nodes: list[Node]

    @property
    def path(self) -> str:
        return ".".join(map(str, self.keys))


def field_problems(errors: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each field that is wrong, in the order of `ValidationError.errors()`."""
    problems: dict[tuple[str | int, ...], str] = {}
    for error in errors:
        keys, sentence = _problem(error)
        problems.setdefault(keys, sentence)
    # A list whose items are wrong is reported as too short, too: the items tell more.
    return [text for keys, text in problems.items() if not any(_is_inside(other, keys) for other in problems)]


def _is_inside(keys: tuple[str | int, ...], outer: tuple[str | int, ...]) -> bool:
    return len(keys) > len(outer) and keys[: len(outer)] == outer


def _problem(error: Mapping[str, Any]) -> tuple[tuple[str | int, ...], str]:
    """The place that an error is about, and its sentence."""
    kind, location = error["type"], error["loc"]
    if kind == "extra_forbidden":
        parent = _locate(location[:-1])
        keys, advice = (
            (*parent.keys, location[-1]),
            suggestion(str(location[-1]), parent.path, known_keys(parent.nodes)),
        )
        return keys, f"{'.'.join(map(str, keys))}: unknown key; {advice}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _kind_problem(error, _locate(location))
    place = _locate(location)
    given = "missing" if kind == "missing" else f"given {quote(error['input'])}"
    return place.keys, f"{place.path}: {given}; must be {_wanted(place)}"


def _kind_problem(error: Mapping[str, Any], place: Place) -> tuple[tuple[str | int, ...], str]:
    parts = [part for node in place.nodes for part in variants(node) if "properties" in part]
    tag = tag_of(parts)
    assert tag is not None, "Pydantic told the members apart"
    given = f"given {quote(error['ctx']['tag'])}" if error["type"] == "union_tag_invalid" else "missing"
    kinds = ", ".join(tag_values(parts, tag))
    return (*place.keys, tag), f"{place.path}.{tag}: {given}; must be one of {kinds}"


def _locate(location: tuple[str | int, ...]) -> Place:
    """Follows Pydantic's location through the schema, leaving out the labels that name a member of a union."""
    keys: list[str | int] = []
    nodes = [spec_schema()]
    for key in location:
        below = [child for node in nodes for child in children(node, key)]
        tagged = [part for node in nodes for part in variants(node) if key in _kinds_of(part)]
        if tagged:
            nodes = tagged
        elif below:
            nodes = below
            keys.append(key)
    return Place(tuple(keys), nodes)


def _kinds_of(node: Node) -> list[str]:
    """The tags of a member of a union such as the tokenizers."""
    tag = tag_of([node])
    return tag_values([node], tag) if tag is not None else []


def _wanted(place: Place) -> str:
    """What may stand there, and in brackets what it is for."""
    wanted = ", or ".join(describe(node) for node in place.nodes)
    purpose = " ".join(place.nodes[0].get("description", "").split()).rstrip(".")
    return f"{wanted} ({purpose})" if purpose else wanted


def quote(value: object) -> str:
    """A value as it stands in the spec, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
