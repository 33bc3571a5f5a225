"""Converted checkpoints are DeepSpeed's universal ones: it loads them itself, and its own converter agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsllm.checkpoint.convert import convert
from dsllm.checkpoint.layout import step_folder
from dsllm.checkpoint.states import ADAM_MOMENTS, MASTER, open_states
from tests.distributed.harness import run_python_ranks
from tests.distributed.universal_runs import STEPS, convert_with_deepspeed

pytestmark = pytest.mark.distributed

BF16 = ["training.precision=bf16"]
SAVED = {
    "stage 0": {"stage": 0, "overrides": []},
    "stage 1": {"stage": 1, "overrides": []},
    "stage 2": {"stage": 2, "overrides": []},
    "stage 3": {"stage": 3, "overrides": []},
    "stage 0 bf16": {"stage": 0, "overrides": BF16},
    "stage 1 bf16": {"stage": 1, "overrides": BF16},
    "stage 3 bf16": {"stage": 3, "overrides": BF16},
}
LOADED = [("stage 3", 1), ("stage 3", 2), ("stage 1", 3), ("stage 0", 2), ("stage 2", 3)]
"""What DeepSpeed itself refuses to carry from one stage to another, and some that it does not."""


def call(function: str, cases: list[dict[str, Any]]) -> None:
    file = Path(__file__).with_name("universal_runs.py")
    results = run_python_ranks(file, function, {"cases": cases}, num_ranks=2, timeout_seconds=240)
    assert results == [[True] * len(cases)] * 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of two ranks, by name."""
    folder = tmp_path_factory.mktemp("universal")
    call("train_and_save", [{**case, "folder": str(folder / name)} for name, case in SAVED.items()])
    return {name: step_folder(folder / name, STEPS) for name in SAVED}


@pytest.fixture(scope="module")
def converted(saved: dict[str, Path]) -> dict[str, Path]:
    return {name: convert(checkpoint)[0] for name, checkpoint in saved.items()}


def states_of(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    states = open_states(checkpoint)
    found = {}
    for name, shape in states.shapes.items():
        for kind in (MASTER, *states.moments(name)):
            found[name, kind] = torch.empty(shape)
            states.copy(kind, name, 0, found[name, kind].view(-1))
    return found


def assert_equal(one: dict[tuple[str, str], torch.Tensor], other: dict[tuple[str, str], torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_a_conversion_keeps_every_bit_and_the_count_of_updates(saved, converted) -> None:
    for name, checkpoint in saved.items():
        assert_equal(states_of(checkpoint), states_of(converted[name]))
        assert open_states(converted[name]).adam_step == open_states(checkpoint).adam_step == STEPS


def test_deepspeed_loads_it_at_stages_that_its_own_would_not(saved, converted, tmp_path: Path) -> None:
    cases = [
        {
            "stage": stage,
            "overrides": [],
            "universal": str(converted[name]),
            "folder": str(tmp_path / f"{name}-{stage}"),
        }
        for name, stage in LOADED
    ]
    call("load_with_deepspeed", cases)
    for (name, _), case in zip(LOADED, cases, strict=True):
        assert_equal(states_of(step_folder(Path(case["folder"]), STEPS)), states_of(saved[name]))


@pytest.mark.parametrize("name", ["stage 1", "stage 2", "stage 3"])
def test_deepspeeds_own_converter_finds_the_same(name: str, saved, converted, tmp_path: Path) -> None:
    convert_with_deepspeed(str(saved[name]), str(tmp_path / "universal"))
    ours = sorted(path.relative_to(converted[name] / "zero") for path in (converted[name] / "zero").glob("*/*.pt"))
    for path in (path for path in ours if path.stem in (MASTER, *ADAM_MOMENTS)):
        theirs = torch.load(tmp_path / "universal" / "zero" / path, weights_only=True)
        own = torch.load(converted[name] / "zero" / path, weights_only=True)
        theirs = theirs if isinstance(theirs, torch.Tensor) else theirs["param"]  # bare and flat from its stage 3
        assert torch.equal(own["param"].flatten(), theirs.flatten()), path
