"""Memory that really runs out, on a rank with a limit: one line says where, what was predicted, and what would fit."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_python_ranks
from tests.distributed.test_resume import arguments
from tests.small_text import write_corpus

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process as Linux does"),
]

SIZE = r"[\d.]+ [MG]iB"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("exhausted")
    corpus = write_corpus(folder / "corpus")
    large_model = ["model.hidden_size=1024", "model.num_layers=4", "zero.stage=0"]
    large_batch = ["batch.global_batch_size=512", "batch.micro_batch_size=256", "zero.stage=1"]
    given = {
        "large_model": arguments(corpus, folder / "model", 1, *large_model),
        "large_batch": arguments(corpus, folder / "batch", 1, *large_batch),
    }
    file = Path(__file__).with_name("exhausted_runs.py")
    return run_python_ranks(file, "tell", given, num_ranks=1, timeout_seconds=120)[0]


def last_line(outcome: dict[str, Any]) -> str:
    assert (outcome["status"], outcome["cause"]) == (1, "out_of_memory"), outcome
    assert "Traceback" not in outcome["stderr"]
    return outcome["stderr"].strip().splitlines()[-1]


def test_memory_that_runs_out_at_the_start_names_the_largest_predicted_terms(told) -> None:
    line = last_line(told["start"])
    assert re.match(
        rf"rank 0: out of memory at the start of the engine(, at {SIZE} of tensors)?; predicted for it", line
    )
    assert re.search(rf"are optimizer {SIZE}, parameters {SIZE}", line)
    assert re.search(r" \(can't allocate memory: you tried to allocate \d+ bytes\)$", line)


def test_memory_that_runs_out_in_a_phase_names_it_and_the_change_that_would_fit(told) -> None:
    line = last_line(told["forward"])
    assert line.startswith("rank 0: out of memory in forward")
    assert re.search(rf"predicted for it are (activations|logits) {SIZE}, ", line)
    assert re.search(rf"; to fit, --set batch.micro_batch_size=\d+ takes {SIZE} \(", line)
