"""The folder of a run: the promised names, whole files, nothing secret."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_text import text_spec, write_corpus

from dsllm.data.prepare import prepare
from dsllm.ds_config import build_ds_config
from dsllm.engine.run_folder import PACKAGES, RunFolder, describe_run, make_passport
from dsllm.engine.starting_point import FROM_SCRATCH
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec

ROOT = Path(__file__).parents[1]
SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_secretsecretsecret"}

SPEAKS_FROM_A_RANK = """
import logging, sys, warnings
from pathlib import Path
from dsllm.engine.run_folder import log_to

log_to(Path(sys.argv[1]), int(sys.argv[2]))
logging.getLogger("dsllm.train").info("from dsllm")
logging.getLogger("dsllm.train").error("for the file", extra={"on_screen": False})
logging.getLogger("another").warning("from another library")
"""


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Spec]:
    """A run's folder as it is before the first step, described with keys in the environment."""
    base = tmp_path_factory.mktemp("run")
    spec = text_spec(write_corpus(base / "corpus"))
    prepare(spec, base / "data", processes=1)
    folder = RunFolder(base / "runs" / "small")
    folder.path.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        describe_run(folder, spec, build_ds_config(spec, 2), make_passport(spec, 2, "cpu", base / "data", FROM_SCRATCH))
    return folder, spec


def test_the_folder_has_the_names_that_scripts_rely_on() -> None:
    folder = RunFolder(Path("runs/my"))
    paths = {str(path.relative_to("runs/my")) for name, path in vars(folder).items() if name != "path"}
    assert paths == {
        "spec.yaml",
        "ds_config.json",
        "passport.json",
        "metrics.jsonl",
        "memory.json",
        "checks.json",
        "history.jsonl",
        "tokenizer",
        "checkpoints",
        "logs",
    }


def test_spec_and_json_are_those_of_the_run(described: tuple[RunFolder, Spec]) -> None:
    folder, spec = described
    assert load_spec(str(folder.spec)) == spec
    assert json.loads(folder.ds_config.read_text()) == build_ds_config(spec, 2)


def test_the_passport_says_what_the_run_was_made_with(described: tuple[RunFolder, Spec]) -> None:
    passport = json.loads(described[0].passport.read_text())
    assert passport["world_size"] == 2
    assert passport["seed"] == 1337
    assert set(passport["packages"]) == set(PACKAGES)
    assert passport["packages"]["deepspeed"]
    assert len(passport["data_hash"]) == len(passport["tokenizer_hash"]) == 64
    assert passport["data_hash"] != passport["tokenizer_hash"]


def test_no_file_of_the_folder_holds_a_key_or_the_environment(described: tuple[RunFolder, Spec]) -> None:
    files = [path for path in described[0].path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"spec.yaml", "ds_config.json", "passport.json"}
    for path in files:
        text = path.read_text()
        assert not any(word in text for pair in SECRETS.items() for word in pair), path
        assert "PATH" not in text


def test_a_second_description_replaces_the_first(described: tuple[RunFolder, Spec], tmp_path: Path) -> None:
    folder, spec = described
    data = folder.path.parents[1] / "data"
    describe_run(folder, spec, {"train_batch_size": 1}, make_passport(spec, 1, "cpu", data, FROM_SCRATCH))
    assert json.loads(folder.ds_config.read_text()) == {"train_batch_size": 1}
    describe_run(folder, spec, build_ds_config(spec, 2), make_passport(spec, 2, "cpu", data, FROM_SCRATCH))
    assert not list(folder.path.glob("*.partial"))


@pytest.mark.parametrize(("rank", "on_screen"), [(0, "from dsllm\n"), (1, "")])
def test_a_rank_logs_everything_to_its_file_and_only_rank_0_speaks(tmp_path: Path, rank: int, on_screen: str) -> None:
    command = [sys.executable, "-c", SPEAKS_FROM_A_RANK, str(tmp_path / "logs"), str(rank)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert (result.stdout, result.stderr) == ("", on_screen)
    lines = (tmp_path / "logs" / f"rank{rank}.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO dsllm.train: from dsllm",
        "ERROR dsllm.train: for the file",
        "WARNING another: from another library",
    ]
