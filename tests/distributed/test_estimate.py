"""Predicted memory against real engines: a sample of what benchmarks/estimate_accuracy.py measures."""

from __future__ import annotations

import itertools
import shutil
from typing import Any

import pytest

from dsllm.plan.memory import PHASES, estimate_memory
from dsllm.plan.workload import workload
from dsllm.spec.load import load_spec
from tests.distributed.harness import ROOT, run_python_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(shutil.which("c++") is None, reason="memory on the CPU is counted by a library compiled here"),
]

NUM_RANKS = 2
LAYERS = "num_layers: 3, hidden_size: 128, num_attention_heads: 4, max_position_embeddings: 128"
WORST, WORST_UNDER = 0.08, 0.05

KINDS = [
    ("gpt2", "fp32", "none", 1, "chunked"),
    ("llama", "fp32", "full", 2, "plain"),
    ("llama", "fp32", "selective", 2, "chunked"),
    ("gpt2", "bf16", "none", 2, "chunked"),
]
MASKED = [
    (1, "gpt2", "fp32", "none", 1, "chunked", "data.mask_documents=true"),
    (3, "llama", "bf16", "full", 2, "chunked", "data.mask_documents=true"),
]
OTHER_FAMILIES = [
    (0, "qwen3", "fp32", "none", 1, "chunked", "model.head_size=64"),
    (3, "mistral", "bf16", "full", 2, "chunked", "model.sliding_window=32"),
    (1, "mixtral", "bf16", "full", 1, "chunked", "model.num_experts=4"),
    (2, "mixtral", "fp32", "none", 2, "chunked", "model.num_experts=4"),
    (3, "mixtral", "fp32", "none", 1, "chunked", "model.num_experts=4"),
]
MUON = [
    (2, "gpt2", "bf16", "none", 2, "chunked", "optimizer.name=muon"),
    (3, "llama", "fp32", "none", 1, "chunked", "optimizer.name=muon"),
]
CASES = [*((stage, *kind) for stage, kind in itertools.product(range(4), KINDS)), *MASKED, *OTHER_FAMILIES, *MUON]


def case_of(
    stage: int, family: str, precision: str, checkpointing: str, accumulation: int, loss: str, *overrides: str
) -> dict[str, Any]:
    return {
        "spec": "quickstart",
        "overrides": [
            f"model={{family: {family}, {LAYERS}}}",
            "tokenizer={kind: bpe, vocab_size: 1024}",
            f"batch={{sequence_length: 128, micro_batch_size: 4, global_batch_size: {4 * accumulation * NUM_RANKS}}}",
            f"training={{train_steps: 100, precision: {precision}, loss: {loss}}}",
            f"training.activation_checkpointing={checkpointing}",
            f"zero={{stage: {stage}}}",
            *overrides,
        ],
    }


@pytest.fixture(scope="module")
def measured() -> dict[tuple[Any, ...], int]:
    """The largest peak of tensor bytes of any rank in each case."""
    arguments = {"cases": [case_of(*case) for case in CASES]}
    script = ROOT / "benchmarks" / "memory_ranks.py"
    ranks = run_python_ranks(script, "measure_each", arguments, num_ranks=NUM_RANKS, timeout_seconds=240)
    peaks = [max(max(rank["peak_bytes"].values()) for rank in on_ranks) for on_ranks in zip(*ranks, strict=True)]
    return dict(zip(CASES, peaks, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case))
def test_the_predicted_peak_is_that_of_a_real_engine(
    case: tuple[Any, ...], measured: dict[tuple[Any, ...], int]
) -> None:
    given = case_of(*case)
    estimate = estimate_memory(workload(load_spec(given["spec"], given["overrides"])), NUM_RANKS, 4, device="cpu")
    predicted = max(estimate.tensor_bytes(phase) for phase in PHASES)
    assert -WORST_UNDER <= predicted / measured[case] - 1 <= WORST
