"""`dsllm data`: what its commands print, and what they say to mistakes."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_text import text_spec, write_corpus
from test_prepare import contents
from typer.testing import CliRunner

from dsllm.cli.data import app
from dsllm.cli.data_progress import progress_text
from dsllm.data.preparation.pipeline import Progress
from dsllm.errors import DataError, UserError
from dsllm.spec.load import dump_spec
from dsllm.units import format_text_bytes


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


def lines_spec(folder: Path, lines: list[str]) -> Path:
    """A spec that reads one file of JSON lines."""
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
    spec = text_spec(
        folder,
        f"data.sources=[{{kind: jsonl, path: '{folder / 'lines.jsonl'}'}}]",
        f"data.directory={folder / 'data'}",
        "data.drop_duplicates=true",
        "data.min_document_characters=10",
    )
    (folder / "lines.yaml").write_text(dump_spec(spec))
    return folder / "lines.yaml"


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    texts = [path.read_text() for path in sorted(write_corpus(tmp_path / "corpus").iterdir())]
    return [json.dumps({"text": text}) for text in [*texts, texts[3], "short"]]


def test_inspect_takes_the_spec_or_the_folder(prepared: tuple[Path, Path]) -> None:
    by_spec, by_folder = (CliRunner().invoke(app, ["inspect", str(target), "--json"]) for target in prepared)
    facts = json.loads(by_spec.stdout)
    mix = facts.pop("mix")
    assert facts == json.loads(by_folder.stdout)
    assert facts["documents"] == sum(split["documents"] for split in facts["splits"].values()) == 40
    assert facts["tokens"] == sum(split["tokens"] for split in facts["splits"].values())
    first = (prepared[0].parent / "corpus" / "document-000.txt").read_text()
    assert facts["sources"][0]["sample"].startswith(first[:50])
    assert [(use["label"], use["share"], use["draws"]) for use in mix["sources"]] == [("corpus", 1.0, 160 * 16)]
    assert "more than data.max_epochs = 4" in mix["warnings"][0]


def test_a_folder_named_like_a_preset_is_taken_only_where_it_is_prepared(
    prepared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    of_spec = CliRunner().invoke(app, ["inspect", "quickstart"])
    assert str(of_spec.exception) == "data/quickstart: no prepared data in it; run dsllm data prepare"
    shutil.copytree(prepared[1], tmp_path / "quickstart", dirs_exist_ok=True)
    assert CliRunner().invoke(app, ["inspect", "quickstart"]).stdout.startswith("quickstart: 40 documents")


@pytest.mark.parametrize("change", ["data.sources.0.label=renamed", "data.validation_fraction=0.2"])
def test_inspect_of_data_of_another_spec_is_refused(prepared: tuple[Path, Path], change: str) -> None:
    result = CliRunner().invoke(app, ["inspect", str(prepared[0]), "--set", change, "--verify"])
    assert isinstance(result.exception, UserError)
    assert f"{prepared[1]}: prepared from a spec with other values of {change[:10]}" in str(result.exception)


def test_small_figures_are_not_rounded_to_nothing(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(prepared[1], tmp_path / "data")  # packing leaves its plan there
    options = ["--set", "training.train_steps=1", "--set", "batch.global_batch_size=1"]
    options += ["--set", "batch.micro_batch_size=1", "--set", "schedule.warmup_steps=0"]
    options += [
        "--set",
        f"data.directory={tmp_path / 'data'}",
        "--set",
        "batch.sequence_length=16",
        "--set",
        "data.packing=best_fit",
    ]
    shown = CliRunner().invoke(app, ["inspect", str(prepared[0]), *options, "--json"])
    (use,) = json.loads(shown.stdout)["mix"]["sources"]
    assert 0 < use["epochs"] < 0.005
    assert use["padding_share"] > 0
    text = CliRunner().invoke(app, ["inspect", str(prepared[0]), *options]).stdout
    assert f"{use['epochs']:.3g}" in text
    assert f"{use['padding_share']:.2%}" in text
    assert "0.0 MB" not in text
    assert " kB, " in text.splitlines()[0]


def test_inspect_shows_lengths_and_the_mix(prepared: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(app, ["inspect", str(prepared[0])])
    assert result.exit_code == 0
    for words in ("median", "longest document", "in the run", "epochs", "corpus begins:"):
        assert words in result.stdout


def test_inspect_verifies_checksums_on_request(prepared: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(app, ["inspect", str(prepared[1]), "--verify"])
    assert result.exit_code == 0
    assert "every file is as it was prepared" in result.stdout


def test_inspect_of_a_folder_that_is_not_prepared_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert isinstance(result.exception, DataError)
    assert "no prepared data in it; run dsllm data prepare" in str(result.exception)


def test_what_is_dropped_is_told_with_its_reason(tmp_path: Path, lines: list[str]) -> None:
    result = CliRunner().invoke(app, ["prepare", str(lines_spec(tmp_path, lines)), "--processes", "1"])
    assert "40 documents" in result.stdout
    assert "dropped 1 duplicate, 1 too short" in result.stdout


def test_a_bad_line_stops_until_it_is_to_be_skipped(tmp_path: Path, lines: list[str]) -> None:
    spec = lines_spec(tmp_path, [*lines[:7], "{nonsense", *lines[7:]])
    stopped = CliRunner().invoke(app, ["prepare", str(spec), "--processes", "1"])
    assert isinstance(stopped.exception, DataError)
    assert f"{tmp_path / 'lines.jsonl'}" in str(stopped.exception)
    assert "line 8" in str(stopped.exception)
    assert "--skip-bad-lines" in str(stopped.exception)
    assert not (tmp_path / "data" / "manifest.json").exists()
    skipped = CliRunner().invoke(app, ["prepare", str(spec), "--processes", "1", "--skip-bad-lines"])
    assert skipped.exit_code == 0
    assert "1 bad line" in skipped.stdout


def test_parts_join_to_what_one_command_prepares(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    spec, whole = prepared
    here = ["--set", f"data.directory={tmp_path / 'data'}"]
    for part in ("1/2", "2/2"):
        result = CliRunner().invoke(app, ["prepare", str(spec), *here, "--shard", part, "--processes", "1"])
        assert f"{tmp_path / 'data.parts' / part.replace('/', '-of-')}: part {part[0]} of 2" in result.stdout
    merged = CliRunner().invoke(app, ["merge", str(spec), *here])
    assert f"{tmp_path / 'data'}: 40 documents" in merged.stdout
    assert contents(tmp_path / "data") == contents(whole)


def test_the_line_after_a_part_can_be_pasted(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["prepare", str(prepared[0]), "--set", f"data.directory={tmp_path / 'my data'}", "--processes", "1"]
    hints = []
    for options in (["--shard", "1/2"], ["--shard", "2/2", "--out", str(tmp_path / "my part")]):
        hints.append(CliRunner().invoke(app, [*command, *options]).stdout.partition("once all parts are there, ")[2])
    whole, named = hints
    assert whole.endswith(" joins them\n")
    assert named.startswith("name the folder of each to join them: ")
    first = shlex.split(whole.removesuffix(" joins them\n"))
    second = shlex.split(named.removeprefix("name the folder of each to join them: "))
    assert second == [*first, str(tmp_path / "my part")]
    assert second[:2] == ["dsllm", "data"]
    merged = CliRunner().invoke(app, [*second[2:], str(tmp_path / "my data.parts" / "1-of-2")])
    assert merged.stdout.startswith(f"{tmp_path / 'my data'}: 40 documents")


def test_a_folder_for_the_whole_is_not_set_with_out(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["prepare", str(prepared[0]), "--out", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert "without --shard; the whole goes to data.directory" in str(result.exception)


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress(), "tokenizer"),
        (Progress(1200, 50_000_000, 12_000_000, 60_000_000, 180_000_000, 0), "10.0 MB/s, 2.4M tokens/s, 10.0s left"),
        # a third was found done, and the rest of the input goes at the pace of what was made since
        (Progress(1200, 50_000_000, 12_000_000, 120_000_000, 180_000_000, 60_000_000), "5.0s left"),
        (Progress(1200, 50_000_000, 12_000_000, 60_000_000, None, 0), "2.4M tokens/s"),
    ],
)
def test_the_progress_line_tells_rates_and_the_time_left(progress: Progress, text: str) -> None:
    assert progress_text(progress, seconds=5.0).endswith(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (4_100, "4.1 kB"),
        (12_100_000, "12.1 MB"),
        (3.2e9, "3.2 GB"),
        (5e13, "50.0 TB"),
    ],
)
def test_text_is_counted_in_a_unit_that_suits_it(num_bytes: float, text: str) -> None:
    assert format_text_bytes(num_bytes) == text


def test_joining_tells_the_time_left_and_no_rates() -> None:
    assert progress_text(Progress(), 0.0, "joining") == "joining"
    assert progress_text(Progress(done_bytes=50, total_bytes=150), 5.0, "joining") == "joining, 10.0s left"


def test_a_mistake_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsllm.cli.app", "data", "prepare", "quickstart"]
    command += ["--set", f"data.sources=[{{kind: text, path: '{tmp_path}'}}]"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "there is no text in it; point it to files that hold some, or remove it" in result.stderr
    assert list(tmp_path.iterdir()) == []
