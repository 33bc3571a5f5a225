"""Compiled blocks train as eager ones do, under every ZeRO stage, checkpointing and masks of documents."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_python_ranks
from tests.distributed.small_runs import reference_run

pytestmark = [
    pytest.mark.slow,  # a minute or two of compilation
    pytest.mark.distributed,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU"),
]

STEPS = 4
FULL = "training.activation_checkpointing=full"


def case(family: str, stage: int, *overrides: str, is_packed: bool = False) -> dict[str, Any]:
    compiled = ["training.compile=true", *overrides]
    return {"family": family, "stage": stage, "accumulation": 2, "overrides": compiled, "is_packed": is_packed}


CASES = [
    case("gpt2", 0, FULL),
    case("gpt2", 1),
    case("llama", 2, FULL, "data.mask_documents=true", is_packed=True),
    case("llama", 3),
    case("gpt2", 3, FULL),
]


def test_compiled_blocks_have_the_losses_of_the_plain_loop_at_every_stage() -> None:
    file = Path(__file__).with_name("small_runs.py")
    arguments = {"cases": CASES, "steps": STEPS}
    outcomes = run_python_ranks(file, "run_cases", arguments, num_ranks=2, timeout_seconds=880)[0]
    for one, outcome in zip(CASES, outcomes, strict=True):
        reference = reference_run(one["family"], STEPS, is_packed=one["is_packed"])
        assert outcome["losses"] == pytest.approx(reference.losses, abs=1e-5), one
