"""Optimizer states and parameters off the accelerator: the same training as a plain PyTorch loop."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_python_ranks
from tests.distributed.small_runs import reference_run
from tests.distributed.test_resume import arguments, records
from tests.small_text import write_corpus

# The first start compiles DeepSpeed's operators, a minute each.
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

STEPS = 3
WIDE = ("model.hidden_size=512",)  # a parameter's share must be 1 MiB or more to be worth a file of its own on NVMe


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed's CPUAdam is compiled at the first start, and there is no g++")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_offload_to_the_host_trains_like_the_plain_loop(num_ranks: int) -> None:
    cases = [
        case(1, "zero.offload_optimizer=cpu"),
        case(2, "zero.offload_optimizer=cpu"),
        case(3, "zero.offload_optimizer=cpu"),
        case(3, "zero.offload_optimizer=cpu", "zero.offload_param=cpu"),
        case(3, "zero.offload_param=cpu"),
    ]
    for losses, one in zip(losses_of(cases, num_ranks), cases, strict=True):
        assert losses == pytest.approx(reference_losses(), abs=1e-3), one


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_offload_to_nvme_trains_like_the_plain_loop_and_really_writes_there(num_ranks: int, tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io needs libaio and its headers, which are not here")
    path = f"zero.nvme_path={tmp_path}"
    cases = [
        case(3, path, "zero.offload_optimizer=nvme", *WIDE),
        case(3, path, "zero.offload_optimizer=nvme", "zero.offload_param=nvme", *WIDE),
        case(3, path, "zero.offload_optimizer=cpu", "zero.offload_param=nvme", *WIDE),
        case(3, path, "zero.offload_param=nvme", *WIDE),
    ]
    for losses, one in zip(losses_of(cases, num_ranks), cases, strict=True):
        assert losses == pytest.approx(reference_losses(WIDE), abs=1e-3), one
    assert list(tmp_path.rglob("*_param.tensor.swp")), "no parameter was ever written to the drive"


def test_a_run_goes_on_with_offload_switched_on_and_off(tmp_path: Path) -> None:
    settings = (
        "model={family: gpt2, num_layers: 2, hidden_size: 64, num_attention_heads: 4}",
        "schedule={name: constant, warmup_steps: 2}",
    )
    offloads = ("stage: 3, offload_optimizer: cpu", "stage: 2, offload_optimizer: cpu")
    both = "stage: 3, offload_optimizer: cpu, offload_param: cpu"
    ways = [(4, "stage: 1"), (6, offloads[0]), (8, offloads[1]), (10, both), (12, "stage: 0")]
    corpus = write_corpus(tmp_path / "corpus")

    def flags(run: str, steps: int, zero: str) -> list[str]:
        length = f"training={{train_steps: {steps}, precision: fp32}}"
        return arguments(corpus, tmp_path / run, 2, *settings, length, f"zero={{{zero}}}")

    runs = [flags("undisturbed", 12, "stage: 2"), *(flags("moved", steps, zero) for steps, zero in ways)]
    file = Path(__file__).with_name("attempts.py")
    ends = run_python_ranks(file, "attempt_each", {"runs": runs}, num_ranks=2, timeout_seconds=600)[0]
    assert [end["status"] for end in ends] == [0] * len(runs), ends
    losses = [[record["loss"] for record in records(tmp_path / run)] for run in ("moved", "undisturbed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def case(stage: int, *overrides: str) -> dict[str, Any]:
    return {"family": "gpt2", "stage": stage, "accumulation": 2, "overrides": list(overrides)}


def losses_of(cases: list[dict[str, Any]], num_ranks: int) -> list[list[float]]:
    outcomes = run_python_ranks(
        Path(__file__).with_name("small_runs.py"),
        "run_cases",
        {"cases": cases, "steps": STEPS},
        num_ranks=num_ranks,
        timeout_seconds=600,
    )
    return [outcome["losses"] for outcome in outcomes[0]]


@functools.cache
def reference_losses(overrides: tuple[str, ...] = ()) -> list[float]:
    return reference_run("gpt2", STEPS, overrides).losses
