"""Checkpoints of runs with Muon: every bit of its momentum, at any stage and number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsllm.checkpoint.convert import convert
from dsllm.checkpoint.layout import step_folder
from dsllm.checkpoint.states import ADAM_MOMENTS, MASTER, MUON_MOMENTS, open_states
from tests.distributed.harness import run_python_ranks
from tests.distributed.muon_runs import SAVED

pytestmark = pytest.mark.distributed

MUON = "optimizer={name: muon, learning_rate: 3.0e-3}"
BF16 = "training.precision=bf16"
RUNS = {
    "stage 2": (2, [MUON]),
    "stage 3": (3, [MUON]),
    "stage 1 bf16": (1, [MUON, BF16]),
    "stage 0 bf16": (0, [MUON, BF16]),
}
ON_TWO_RANKS = [
    ("stage 2", 2),
    ("stage 3", 3),
    ("stage 1 bf16", 1),
    ("stage 0 bf16", 0),
    ("stage 3", 1),
    ("stage 2", 3),
]
ON_ONE_RANK = [("stage 3", 2), ("stage 2", 0)]


def start(num_ranks: int, cases: list[dict[str, Any]]) -> list[list[float]]:
    file = Path(__file__).with_name("muon_runs.py")
    return run_python_ranks(file, "run_each", {"cases": cases}, num_ranks=num_ranks, timeout_seconds=280)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("muon")


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path) -> dict[Any, list[float]]:
    """Losses of every run, by its name, and of what went on from it, by its name and the stage."""
    begun = [
        {"stage": stage, "overrides": overrides, "folder": str(folder / name)}
        for name, (stage, overrides) in RUNS.items()
    ]
    ways = [resumed(step_folder(folder / name, SAVED), name, stage) for name, stage in ON_TWO_RANKS]
    return dict(zip([*RUNS, *ON_TWO_RANKS], start(2, [*begun, *ways]), strict=True))


def resumed(checkpoint: Path, name: str, stage: int) -> dict[str, Any]:
    return {"stage": stage, "overrides": RUNS[name][1], "checkpoint": str(checkpoint)}


def test_a_run_with_muon_goes_on_exactly_and_at_another_stage_alike(on_two_ranks) -> None:
    for name, stage in ON_TWO_RANKS:
        expected = on_two_ranks[name][SAVED:]
        is_same = stage == RUNS[name][0]
        assert on_two_ranks[name, stage] == (expected if is_same else pytest.approx(expected, abs=1e-5)), (name, stage)


def test_a_run_with_muon_goes_on_on_another_number_of_ranks_also_when_it_was_converted(folder, on_two_ranks) -> None:
    checkpoints = {name: step_folder(folder / name, SAVED) for name, _ in ON_ONE_RANK}
    converted = {name: convert(checkpoint)[0] for name, checkpoint in checkpoints.items()}
    ways = [(found[name], name, stage) for found in (checkpoints, converted) for name, stage in ON_ONE_RANK]
    for (checkpoint, name, _), losses in zip(ways, start(1, [resumed(*way) for way in ways]), strict=True):
        assert losses == pytest.approx(on_two_ranks[name][SAVED:], abs=1e-5), checkpoint


def test_a_conversion_keeps_the_momentum_of_matrices_and_both_moments_of_the_rest(folder, on_two_ranks) -> None:
    checkpoint = step_folder(folder / "stage 1 bf16", SAVED)
    universal, _ = convert(checkpoint)
    saved, converted = open_states(checkpoint), open_states(universal)
    for name, shape in saved.shapes.items():
        is_muons = ".h." in name and len(shape) == 2
        assert saved.moments(name) == converted.moments(name) == (MUON_MOMENTS if is_muons else ADAM_MOMENTS), name
        for kind in (MASTER, *saved.moments(name)):
            one, other = torch.empty(shape), torch.empty(shape)
            saved.copy(kind, name, 0, one.view(-1))
            converted.copy(kind, name, 0, other.view(-1))
            assert torch.equal(one, other), (name, kind)
            assert one.any() or kind == MASTER, "nothing was compared"
