"""`dsllm data`: what its commands print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_text import text_spec, write_corpus
from typer.testing import CliRunner

from dsllm.cli.data import app
from dsllm.errors import DataError
from dsllm.spec.load import dump_spec


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A spec's file, and the folder that `data prepare` filled from it."""
    folder = tmp_path_factory.mktemp("cli")
    spec = text_spec(write_corpus(folder / "corpus"), f"data.directory={folder / 'data'}")
    (folder / "small.yaml").write_text(dump_spec(spec))
    result = CliRunner().invoke(app, ["prepare", str(folder / "small.yaml"), "--processes", "1"])
    assert result.exit_code == 0
    assert "40 documents" in result.stdout
    assert "400 in the vocabulary" in result.stdout
    return folder / "small.yaml", folder / "data"


def test_inspect_takes_the_spec_or_the_folder(prepared: tuple[Path, Path]) -> None:
    by_spec, by_folder = (CliRunner().invoke(app, ["inspect", str(target), "--json"]) for target in prepared)
    assert by_spec.stdout == by_folder.stdout
    facts = json.loads(by_spec.stdout)
    assert facts["documents"] == sum(split["documents"] for split in facts["splits"].values()) == 40
    assert facts["tokens"] == sum(split["tokens"] for split in facts["splits"].values())
    first = (prepared[0].parent / "corpus" / "document-000.txt").read_text()
    assert facts["sample"].startswith(first[:50])


def test_inspect_verifies_checksums_on_request(prepared: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(app, ["inspect", str(prepared[1]), "--verify"])
    assert result.exit_code == 0
    assert "every file is as it was prepared" in result.stdout


def test_inspect_of_a_folder_that_is_not_prepared_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert isinstance(result.exception, DataError)
    assert "no prepared data in it; run dsllm data prepare" in str(result.exception)
