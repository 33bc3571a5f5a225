"""What a run's folder says of one of its checkpoints: as it was then, and nothing that the folder does not say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsllm.checkpoint.layout import run_folder_of
from dsllm.checkpoint.manifest import Manifest, read_manifest
from dsllm.data import shards
from dsllm.data.prepare import default_directory
from dsllm.engine.run_folder import RunFolder
from dsllm.errors import DataError
from dsllm.spec.sections import Spec


class Measured(NamedTuple):
    """A number, or several by label, and the step after which it was taken."""

    value: Any
    step: int


@dataclass(frozen=True)
class RunFacts:
    """A checkpoint and its run."""

    spec: Spec
    checkpoint: Manifest
    passport: Mapping[str, Any]
    """Empty where there is none."""
    measured: Mapping[str, Measured]
    """The last of each of the records' numbers, up to the checkpoint's step."""
    data: shards.Manifest | None
    """None where the tokens that the run was trained on are not here."""


def read_facts(checkpoint: Path, spec: Spec) -> RunFacts:
    """What is known of a complete checkpoint."""
    folder, manifest = RunFolder(run_folder_of(checkpoint)), read_manifest(checkpoint)
    passport = json.loads(folder.passport.read_text()) if folder.passport.is_file() else {}
    measured = last_measured(folder.metrics, manifest.step)
    return RunFacts(spec, manifest, passport, measured, _data_of(spec, passport))


def last_measured(metrics: Path, step: int) -> dict[str, Measured]:
    """The last of each number in a run's `metrics.jsonl` up to `step`; empty without that file."""
    measured: dict[str, Measured] = {}
    for record in _records(metrics):
        if record["step"] <= step:
            measured |= {name: Measured(value, record["step"]) for name, value in record.items() if value is not None}
    return measured


def _records(metrics: Path) -> Iterator[dict[str, Any]]:
    """Those of whole lines: a killed run may have left half of one."""
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _data_of(spec: Spec, passport: Mapping[str, Any]) -> shards.Manifest | None:
    """The manifest of the prepared tokens, where they are those that the run's passport names."""
    directory = default_directory(spec)
    try:
        is_the_same = shards.manifest_hash(directory) == passport.get("data_hash")
        return shards.read_manifest(directory) if is_the_same else None
    except DataError:
        return None
