"""Specs from files, presets and overrides, with every problem in one answer; and back into YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dsllm.errors import SpecError, UserError
from dsllm.spec.config_file import with_local_config
from dsllm.spec.rules import broken_rules
from dsllm.spec.sections import Spec
from dsllm.spec.yaml_text import dump_yaml, read_document

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names of the specs that come with dsllm, in alphabetical order."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_spec(name_or_path: str, overrides: Sequence[str] = ()) -> Spec:
    """The spec in a YAML or JSON file, or a preset, with `section.key=value` overrides applied in order; and with what
    is in the config.json of an automatic model, which overrides may reach into.

    Raises UserError for a file that is missing or unreadable, and SpecError with every problem of its content.
    """
    path = find_spec(name_or_path)
    document = with_local_config(_mapping(read_document(path, name_or_path), name_or_path))
    problems: list[str] = []
    if overrides:
        from dsllm.spec.overrides import apply_overrides  # builds the schema, which plain loading does not need

        document, problems = apply_overrides(document, overrides)
        document = with_local_config(document)
    return _validate(document, name_or_path, problems)


def parse_spec(mapping: Mapping[str, Any], source: str = "spec") -> Spec:
    """The spec in a mapping as YAML gives it; `source` opens the message of the SpecError that lists its problems."""
    return _validate(_mapping(mapping, source), source, [])


def dump_spec(spec: Spec) -> str:
    """YAML of the spec with every default written out; it loads back as an equal spec."""
    return dump_yaml(spec.model_dump(mode="json"))


def find_spec(name_or_path: str) -> Path:
    """The file of a spec: one that exists, else the preset of that name, with or without `.yaml`."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    preset = PRESETS / f"{name_or_path.removesuffix('.yaml')}.yaml"
    if preset.parent == PRESETS and preset.is_file():
        return preset
    if path.is_dir():
        raise UserError(f"{name_or_path}: a folder; give the spec file in it")
    raise UserError(_not_found(name_or_path))


def _not_found(name_or_path: str) -> str:
    from difflib import get_close_matches

    names = preset_names()
    near = get_close_matches(Path(name_or_path).stem, names, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}?" if near else f"presets are {', '.join(names)}"
    return f"{name_or_path}: there is no such file, and no preset of that name; {advice}"


def _mapping(document: Any, source: str) -> dict[str, Any]:
    if not isinstance(document, Mapping):
        found = "empty" if document is None else f"a {type(document).__name__}"
        raise UserError(f"{source}: given {found}; a spec is a mapping of the sections {', '.join(Spec.model_fields)}")
    return {str(key): value for key, value in document.items()}


def _validate(document: dict[str, Any], source: str, problems: list[str]) -> Spec:
    """The spec, or a SpecError with the problems so far, those of the fields and those of the rules."""
    try:
        spec = Spec.model_validate(document)
    except SpecError as error:
        raise SpecError(problems + error.problems, source) from error
    except ValidationError as error:
        from dsllm.spec.messages import field_problems  # builds the schema, which a valid spec does not need

        found = field_problems(error.errors(include_url=False))
        raise SpecError(problems + found + broken_rules(_valid_sections(document)), source) from error
    if problems:
        raise SpecError(problems, source)
    return spec


def _valid_sections(document: Mapping[str, Any]) -> dict[str, object]:
    """Those parts of a faulty spec that are valid on their own, absent ones with a default included."""
    sections: dict[str, object] = {}
    for name, field in Spec.model_fields.items():
        if name not in document:
            if not field.is_required():
                sections[name] = field.default
            continue
        try:
            sections[name] = TypeAdapter(field.rebuild_annotation()).validate_python(document[name])
        except ValidationError:
            continue
    return sections
