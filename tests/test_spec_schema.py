"""The JSON Schema: complete, documented, and at one with what is accepted."""

from __future__ import annotations

from dsllm.spec.schema import field_paths, spec_schema
from dsllm.spec.sections import Section


def test_every_field_of_every_section_is_documented() -> None:
    sections = [spec_schema(), *spec_schema()["$defs"].values()]
    bare = [
        f"{section['title']}.{name}"
        for section in sections
        for name, field in section["properties"].items()
        if not field.get("description")
    ]
    assert bare == []


def test_every_section_is_frozen_and_closed() -> None:
    sections = [Section, *Section.__subclasses__()]
    assert all(section.model_config.get("frozen") for section in sections)
    assert all(definition["additionalProperties"] is False for definition in spec_schema()["$defs"].values())


def test_paths_reach_into_sections() -> None:
    assert {"seed", "zero", "zero.stage", "logging.wandb.project", "tokenizer.vocab_size"} <= set(field_paths())
