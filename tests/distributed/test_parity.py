"""Every ZeRO stage, on one rank and on two, is the same training as a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_python_ranks
from tests.distributed.reference import ReferenceRun
from tests.distributed.small_runs import reference_run

pytestmark = pytest.mark.distributed

STEPS = 20
STAGES = (0, 1, 2, 3)
FP32_CASES = [
    {"family": "gpt2", "stage": stage, "accumulation": accumulation, "overrides": []}
    for stage in STAGES
    for accumulation in (1, 4)
] + [
    {"family": "llama", "stage": 2, "accumulation": 1, "overrides": []},
    {"family": "llama", "stage": 3, "accumulation": 1, "overrides": ["training.activation_checkpointing=full"]},
    {"family": "llama", "stage": 1, "accumulation": 2, "overrides": ["model.tie_word_embeddings=false"]},
    {"family": "gpt2", "stage": 2, "accumulation": 1, "overrides": ["training.activation_checkpointing=selective"]},
    {"family": "gpt2", "stage": 3, "accumulation": 1, "overrides": ["zero.overlap_comm=false"]},
]
BF16_CASES = [
    {"family": "gpt2", "stage": stage, "accumulation": 2, "overrides": ["training.precision=bf16"]} for stage in STAGES
]
FP16_CASES = [
    {
        "family": "gpt2",
        "stage": stage,
        "accumulation": 2,
        "overrides": ["training.precision=fp16", "training.loss_scale=1024.0"],
    }
    for stage in (1, 2, 3)
]
PACKED_CASES = [
    {"family": "gpt2", "stage": 1, "accumulation": 4, "overrides": [], "is_packed": True},
    {
        "family": "llama",
        "stage": 3,
        "accumulation": 2,
        "overrides": ["training.activation_checkpointing=full"],
        "is_packed": True,
    },
]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def outcomes(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What every case gave on rank 0, from one start of DeepSpeed."""
    cases = {"cases": FP32_CASES + BF16_CASES + FP16_CASES + PACKED_CASES, "steps": STEPS}
    return run_python_ranks(
        Path(__file__).with_name("small_runs.py"), "run_cases", cases, num_ranks=request.param, timeout_seconds=280
    )[0]


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, tuple[str, ...]], ReferenceRun]:
    """The plain loop, once for each model that the cases train."""
    models = (("gpt2", ()), ("llama", ()), ("llama", ("model.tie_word_embeddings=false",)))
    return {(family, overrides): reference_run(family, STEPS, overrides) for family, overrides in models}


def test_fp32_losses_and_norms_equal_the_plain_loop_at_every_stage(outcomes, references) -> None:
    for case, outcome in zip(FP32_CASES, outcomes, strict=False):
        key = (case["family"], tuple(text for text in case["overrides"] if "tie_word" in text))
        assert outcome["losses"] == pytest.approx(references[key].losses, abs=1e-4), case
        assert outcome["norms"] == pytest.approx(references[key].gradient_norms, rel=1e-3), case
    assert outcomes[0]["losses"][-1] < outcomes[0]["losses"][0] - 0.5, "nothing was learned"


def test_losses_in_half_precision_agree_over_the_stages_and_with_fp32(outcomes, references) -> None:
    for case, outcome in zip(BF16_CASES + FP16_CASES, outcomes[len(FP32_CASES) :], strict=False):
        assert outcome["losses"] == pytest.approx(references["gpt2", ()].losses, abs=3e-2), case


def test_packed_and_padded_batches_train_as_each_document_alone_would(outcomes) -> None:
    """On the mean over the counted tokens of the global batch, though a micro-batch is nothing but padding."""
    for case, outcome in zip(PACKED_CASES, outcomes[-len(PACKED_CASES) :], strict=True):
        reference = reference_run(case["family"], STEPS, is_packed=True)
        assert outcome["losses"] == pytest.approx(reference.losses, abs=1e-4), case
        assert outcome["norms"] == pytest.approx(reference.gradient_norms, rel=1e-3), case


def test_validation_losses_are_those_of_the_first_step_by_label(outcomes) -> None:
    for outcome in outcomes:
        validation, first = outcome["validation"], pytest.approx(outcome["losses"][0], abs=1e-5)
        assert validation == {"val_loss": first, "val_losses": {"news": first, "code": first}}


def test_the_same_seed_gives_the_same_bits_at_every_stage_and_on_any_number_of_ranks(outcomes) -> None:
    tied_gpt2 = [
        outcome["digest"] for case, outcome in zip(FP32_CASES, outcomes, strict=False) if case["family"] == "gpt2"
    ]
    assert set(tied_gpt2) == {FIRST_DIGESTS.setdefault("fp32", tied_gpt2[0])}
    bf16 = [outcome["digest"] for outcome in outcomes[len(FP32_CASES) : len(FP32_CASES) + len(BF16_CASES)]]
    assert set(bf16) == {FIRST_DIGESTS.setdefault("bf16", bf16[0])}
    assert tied_gpt2[0] != bf16[0]


FIRST_DIGESTS: dict[str, str] = {}
"""By precision: the first digest seen, which those of the other number of ranks must equal."""
