"""`dsllm checkpoints`: what a run has, whether it is sound, and converting it; on a checkpoint of a real engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsllm.checkpoint.manifest import read_manifest
from dsllm.cli.app import app
from dsllm.errors import DsllmError, UserError
from tests.distributed.harness import run_ranks
from tests.distributed.test_resume import TRAIN, arguments
from tests.small_text import write_corpus


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with checkpoints after 2 and 4 steps."""
    folder = tmp_path_factory.mktemp("checkpoints")
    settings = ("training={train_steps: 4, precision: fp32}", "checkpoint.interval=2")
    flags = arguments(write_corpus(folder / "corpus"), folder / "run", 3, *settings)
    run_ranks([TRAIN, *flags], num_ranks=1, timeout_seconds=120)
    return folder / "run"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def dsllm(*words: str | Path) -> tuple[int, str]:
    """Exit status and what was printed; a fault is raised as the entry point would see it."""
    result = CliRunner().invoke(app, ["checkpoints", *map(str, words)])
    if isinstance(result.exception, DsllmError):
        raise result.exception
    return result.exit_code, result.stdout


def test_list_shows_each_with_what_wrote_it_and_the_latest(run: Path) -> None:
    status, table = dsllm("list", run)
    assert status == 0
    lines = [line.split() for line in table.splitlines() if "global_step" in line]
    assert [line[0] for line in lines] == ["global_step2", "global_step4"]
    assert "ZeRO stage 3 on 1 rank(s)" in table
    assert [line[-1] == "latest" for line in lines] == [False, True]
    entries = json.loads(dsllm("list", run, "--json")[1])
    files = read_manifest(run / "checkpoints/global_step4").files
    assert entries[1] == {
        "name": "global_step4",
        "path": str(run / "checkpoints/global_step4"),
        "step": 4,
        "zero_stage": 3,
        "world_size": 1,
        "origin": "ZeRO stage 3 on 1 rank(s)",
        "size_bytes": sum(file.size_bytes for file in files.values()),
        "is_latest": True,
    }


def test_the_manifest_names_every_file_with_its_size(run: Path) -> None:
    folder = run / "checkpoints/global_step4"
    found = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"}
    assert {name: record.size_bytes for name, record in read_manifest(folder).files.items()} == found


def test_verify_reads_all_and_exits_with_1_where_one_is_damaged(run: Path) -> None:
    assert dsllm("verify", run)[0] == 0
    victim = next((run / "checkpoints/global_step4").glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 4
    victim.write_bytes(content)
    (run / "checkpoints/global_step2/manifest.json").unlink()
    status, table = dsllm("verify", run)
    assert status == 1
    assert f"{victim.name} is damaged: its checksum is not that of what was written" in table
    entries = json.loads(dsllm("verify", run, "--json")[1])
    assert entries[0]["faults"] == ["not complete: its save was interrupted"]
    assert len(entries[1]["faults"]) == 1


def test_convert_says_where_and_how_to_go_on_and_never_overwrites(run: Path, tmp_path: Path) -> None:
    status, said = dsllm("convert", run)
    target = run / "checkpoints/global_step4_universal"
    assert status == 0
    assert f"{target}: the state after 4 steps, " in said
    assert f"go on from it with --resume {target}" in said
    assert "any stage and number of ranks" in dsllm("list", run)[1]
    assert dsllm("verify", run)[0] == 0
    with pytest.raises(UserError, match="global_step4_universal: not empty; choose another folder for the converted"):
        dsllm("convert", run)
    dsllm("convert", run / "checkpoints/global_step2", "--output", tmp_path / "kept")
    brought = {path.name for path in (tmp_path / "kept").iterdir()}
    assert {"spec.yaml", "passport.json", "history.jsonl", "tokenizer", "zero", "manifest.json"} <= brought


def test_a_damaged_checkpoint_is_not_converted_and_nothing_is_left(run: Path) -> None:
    next((run / "checkpoints/global_step4").glob("*optim_states.pt")).unlink()
    with pytest.raises(DsllmError, match=r"optim_states\.pt is missing; convert another checkpoint"):
        dsllm("convert", run)
    assert list((run / "checkpoints").glob("*universal*")) == []


def test_a_folder_without_checkpoints_is_one_line(tmp_path: Path) -> None:
    for command in ("list", "verify", "convert"):
        with pytest.raises(UserError, match="no checkpoint there; give a run, its checkpoints, or a global_step<N>"):
            dsllm(command, tmp_path)
