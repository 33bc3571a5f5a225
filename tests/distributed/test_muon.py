"""Muon and AdamW together, at every stage and precision, are the same training as a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_python_ranks
from tests.distributed.small_runs import reference_run

pytestmark = pytest.mark.distributed

STEPS = 8
MUON = "optimizer={name: muon, learning_rate: 3.0e-3, muon_learning_rate: 0.02, gradient_clipping: 0.3}"
UNTIED = "model.tie_word_embeddings=false"
STAGES = (0, 1, 2, 3)


def case(stage: int, accumulation: int, *overrides: str, family: str = "gpt2") -> dict[str, Any]:
    return {"family": family, "stage": stage, "accumulation": accumulation, "overrides": [MUON, *overrides]}


OFFLOADED = "zero.offload_optimizer=cpu"
FP32_CASES = [
    *(case(stage, 4) for stage in STAGES),
    case(3, 2, UNTIED, family="llama"),
    case(3, 2, family="mixtral"),
    case(2, 2, OFFLOADED),
    case(3, 2, OFFLOADED, "zero.offload_param=cpu"),
]
HALF_CASES = [
    *(case(stage, 2, "training.precision=bf16") for stage in STAGES),
    *(case(stage, 2, "training.precision=fp16", "training.loss_scale=1024.0") for stage in (1, 2, 3)),
    case(2, 2, "training.precision=bf16", OFFLOADED),
]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    """What every case gave on rank 0 of two, from one start of DeepSpeed."""
    cases = {"cases": FP32_CASES + HALF_CASES, "steps": STEPS}
    return run_python_ranks(
        Path(__file__).with_name("small_runs.py"), "run_cases", cases, num_ranks=2, timeout_seconds=280
    )[0]


def test_fp32_losses_and_norms_with_muon_equal_the_plain_loop_at_every_stage(outcomes) -> None:
    """Over micro-batches and ranks, with gradients clipped before they are made orthogonal."""
    references = {
        "gpt2": reference_run("gpt2", STEPS, (MUON,)),
        "llama": reference_run("llama", STEPS, (MUON, UNTIED)),
        "mixtral": reference_run("mixtral", STEPS, (MUON,)),
    }
    assert min(references["gpt2"].gradient_norms) > 0.3, "nothing was clipped"
    for case, outcome in zip(FP32_CASES, outcomes, strict=False):
        reference = references[case["family"]]
        assert outcome["losses"] == pytest.approx(reference.losses, abs=1e-5), case
        assert outcome["norms"] == pytest.approx(reference.gradient_norms, rel=1e-4), case


def test_losses_in_half_precision_with_muon_fall_as_in_fp32_at_every_stage(outcomes) -> None:
    reference = reference_run("gpt2", STEPS, (MUON,))
    for case, outcome in zip(HALF_CASES, outcomes[len(FP32_CASES) :], strict=True):
        assert outcome["losses"] == pytest.approx(reference.losses, abs=3e-2), case
    assert reference.losses[-1] < reference.losses[0] - 0.3, "nothing was learned"
