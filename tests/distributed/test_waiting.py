"""The host waits for the device only where a number is printed, or DeepSpeed decides about a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_python_ranks
from tests.distributed.waiting_runs import STEPS

pytestmark = pytest.mark.distributed

BF16 = "training.precision=bf16"
CASES = {
    ("gpt2", 0): [],
    ("gpt2", 1): [BF16, "training.activation_checkpointing=full"],
    ("llama", 2): [BF16, "data.mask_documents=true"],
    ("llama", 3): [BF16, "optimizer.name=muon"],
}
DECIDING = {("gpt2", 0): 1, ("gpt2", 1): 2, ("llama", 2): 4, ("llama", 3): 1}
"""Reads a step, at most, in which it is decided whether gradients are finite: docs/speed.md lists them."""


@pytest.fixture(scope="module")
def counted() -> dict[tuple[str, int], dict[str, Any]]:
    cases = [{"family": family, "stage": stage, "overrides": overrides} for (family, stage), overrides in CASES.items()]
    file = Path(__file__).with_name("waiting_runs.py")
    ranks = run_python_ranks(file, "count_each", {"cases": cases}, num_ranks=2, timeout_seconds=240)
    return dict(zip(CASES, ranks[0], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_no_micro_step_reads_what_the_device_has_computed(case: tuple[str, int], counted) -> None:
    found, places = counted[case]["found"], counted[case]["places"]
    within = {part: places[part] for part in found if "last micro-step" not in part}
    assert within == {}
    assert "forward of the last micro-step" not in found, places


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_no_more_than_it_takes_to_decide_about_it(case: tuple[str, int], counted) -> None:
    assert 0 < sum(counted[case]["found"].values()) <= STEPS * DECIDING[case], counted[case]["places"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_torch_itself_sees_no_micro_step_wait() -> None:
    file = Path(__file__).with_name("waiting_runs.py")
    # liger-kernel's loss, which auto takes where it is installed, reads the number of labels in every forward
    overrides = [BF16, "zero.overlap_comm=false", "training.loss=chunked"]
    cases = {"cases": [{"family": "gpt2", "overrides": overrides}]}
    cuda = {"DS_ACCELERATOR": "cuda"}
    assert run_python_ranks(file, "forbid_each", cases, num_ranks=1, timeout_seconds=240, env=cuda) == [[True]]
