"""The checks before the first step on real ranks: they pass at every stage, fire on every fault, and leave no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import ROOT, free_port, run_python_ranks
from tests.distributed.test_resume import arguments, records
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

RANKS = Path(__file__).with_name("gate_runs.py")
GPT2 = "model={family: gpt2, num_layers: 2, hidden_size: 128, num_attention_heads: 4, initializer_range: 0.05}"
STAGES = {
    "stage 0": ["zero.stage=0", "training.precision=bf16"],
    "stage 1": ["zero.stage=1", "training.precision=bf16", GPT2],
    "stage 2": ["zero.stage=2", "training.activation_checkpointing=full"],
    "stage 3": ["zero.stage=3", GPT2, "model.tie_word_embeddings=false"],
    "muon": ["zero.stage=3", GPT2, "training.precision=bf16", "optimizer.name=muon"],
}
SIZES = "num_attention_heads: 4, hidden_size: 64, intermediate_size: 128, max_position_embeddings: 256"
OTHER_NETWORKS = {
    "experts": ["zero.stage=3", f"model={{family: mixtral, num_layers: 2, {SIZES}}}"],
    "any type": [
        "zero.stage=3",
        f"model={{family: auto, config: {{model_type: gpt_neox, num_hidden_layers: 2, {SIZES}}}}}",
    ],
}
FAULTS = {
    "wide weights": "weights",
    "labels two ahead": "one batch",
    "undivided accumulation": "accumulation",
    "lost rank": "stage 2 against 1",
}
"""The check that finds each."""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """What every case gave on rank 0, from one start of DeepSpeed."""
    cases = {name: {"overrides": overrides} for name, overrides in STAGES.items()}
    cases |= {name: {"overrides": overrides} for name, overrides in OTHER_NETWORKS.items()}
    cases |= {name: {"overrides": ["model.num_layers=2"], "fault": name} for name in FAULTS}
    results = run_python_ranks(RANKS, "check_each", {"cases": list(cases.values())}, num_ranks=2, timeout_seconds=360)
    assert [result["checks"].keys() for result in results[0]] == [result["checks"].keys() for result in results[1]]
    return dict(zip(cases, results[0], strict=True))


@pytest.mark.parametrize("stage", range(4))
def test_a_sound_run_passes_every_check_at_every_stage(outcomes: dict[str, dict[str, Any]], stage: int) -> None:
    checks = outcomes[f"stage {stage}"]["checks"]
    against = f"stage {stage} against {2 if stage == 1 else 1}"
    assert list(checks) == ["first loss", "one batch", "accumulation", against, "weights"]
    assert [check for check in checks.values() if not check["passed"]] == []


def test_a_run_with_muon_passes_every_check(outcomes: dict[str, dict[str, Any]]) -> None:
    assert [check for check in outcomes["muon"]["checks"].values() if not check["passed"]] == []


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_experts_and_types_without_a_family_pass_every_check(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    assert [check for check in outcomes[name]["checks"].values() if not check["passed"]] == []


@pytest.mark.parametrize("stage", range(4))
def test_checks_leave_random_state_and_torchs_own_functions_as_they_were(
    outcomes: dict[str, dict[str, Any]], stage: int
) -> None:
    assert outcomes[f"stage {stage}"]["is_as_before"]


def test_checks_give_their_memory_back(outcomes: dict[str, dict[str, Any]]) -> None:
    kept_bytes = [outcomes[f"stage {stage}"]["kept_bytes"] for stage in range(4)]
    assert all(abs(kept) < 2**16 for kept in kept_bytes[:3]), kept_bytes
    assert kept_bytes[3] < 8 * 2**20, "DeepSpeed keeps engines of stage 3 alive"


@pytest.mark.parametrize(("fault", "name"), FAULTS.items())
def test_every_planted_fault_is_found_by_its_check(outcomes: dict[str, dict[str, Any]], fault: str, name: str) -> None:
    checks = outcomes[fault]["checks"]
    failed = [check["name"] for check in checks.values() if not check["passed"]]
    assert name in failed
    assert checks["first loss"]["passed"], "none of these faults shows in the first loss"
    assert ("accumulation" in failed) is (name == "accumulation"), "only one of them is one of accumulation"


def test_a_fault_is_told_with_what_was_found_and_what_is_due(outcomes: dict[str, dict[str, Any]]) -> None:
    weights = outcomes["wide weights"]["checks"]["weights"]
    assert "has mean" in weights["found"]
    assert "and deviation 0.022 where 0 and 0.02 are due" in weights["found"]
    assert "more like it" in weights["found"]
    accumulation = outcomes["undivided accumulation"]["checks"]["accumulation"]["found"]
    assert accumulation.startswith("gradient norm ")
    assert accumulation.endswith(", in step 1")
    found, due = (float(word) for word in accumulation.split() if word[0].isdigit() and word != "1")
    assert found == pytest.approx(4 * due, rel=1e-3)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def ends(folder: Path) -> dict[str, Any]:
    """Runs with and without checks at stages 2 and 3, one that goes on, and one with a fault; how each ended."""
    corpus = write_corpus(folder / "corpus")

    def run(name: str, stage: int, *overrides: str) -> dict[str, Any]:
        shortened = ("training.train_steps=3", "checkpoint.interval=10", *overrides)
        return {"arguments": arguments(corpus, folder / name, stage, *shortened)}

    on, off = "guards.step_0_checks=true", "guards.step_0_checks=false"
    runs = {f"{stage} {word}": run(f"{stage} {word}", stage, word) for stage in (2, 3) for word in (on, off)}
    runs["resumed"] = run(f"2 {on}", 2, on, "training.train_steps=4")
    runs["faulty"] = {**run("faulty", 2, on), "fault": "undivided accumulation"}
    results = run_python_ranks(RANKS, "train_each", {"runs": list(runs.values())}, num_ranks=2, timeout_seconds=240)
    assert [end["status"] for end in results[0]] == [end["status"] for end in results[1]]
    return dict(zip(runs, results[0], strict=True))


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_are_bit_identical_with_and_without_the_checks(ends: dict[str, Any], folder: Path, stage: int) -> None:
    with_checks, without = (records(folder / f"{stage} guards.step_0_checks={word}") for word in ("true", "false"))
    assert [record["step"] for record in without] == [1, 2, 3]
    for field in ("loss", "grad_norm", "val_loss"):
        found, expected = ([record.get(field) for record in run[:3]] for run in (with_checks, without))
        assert found == expected


def test_a_fresh_run_logs_one_line_for_its_checks_and_keeps_the_numbers(ends: dict[str, Any], folder: Path) -> None:
    run = folder / "2 guards.step_0_checks=true"
    lines = [line for line in (run / "logs" / "rank0.log").read_text().splitlines() if "checks  " in line]
    assert len(lines) == 1, "a run that goes on is not checked again"
    assert "checks  weights, first loss, one batch, accumulation, stage 2 against 1: passed in " in lines[0]
    assert ends["resumed"]["status"] == 0
    assert json.loads((run / "checks.json").read_text())["passed"] is True
    assert not (folder / "2 guards.step_0_checks=false" / "checks.json").exists()


def test_a_run_whose_checks_fail_ends_with_1_before_its_first_step(ends: dict[str, Any], folder: Path) -> None:
    assert ends["faulty"]["status"] == 1
    (line,) = [line for line in ends["faulty"]["stderr"].splitlines() if line.startswith("check before the first step")]
    assert "accumulation: expected " in line
    assert "found gradient norm " in line
    assert line.endswith("--set guards.step_0_checks=false trains without the checks")
    assert records(folder / "faulty") == []
    assert json.loads((folder / "faulty" / "checks.json").read_text())["passed"] is False


def test_dsllm_check_prints_every_check_as_json_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsllm.cli.app", "check", "quickstart", "--num-gpus", "1", "--json"]
    result = subprocess.run(
        [*command, "--master-port", str(free_port()), "--set", "model.num_layers=2"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["passed"] is True
    assert [set(check) for check in answer["checks"]] == [{"name", "passed", "expected", "found", "seconds"}] * 5
    assert list(tmp_path.iterdir()) == []
