"""Predictions of runs that others have made and published."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from statistics import median

import pytest

from dsllm.plan.known_runs import KNOWN_RUNS, KnownRun
from dsllm.plan.memory import estimate_memory
from tests.llm_foundry_rows import ROWS, predicted

ROOT = Path(__file__).resolve().parents[1]
PLANNING = ROOT / "docs/planning.md"
GENERATE = runpy.run_path(str(ROOT / "docs/generate.py"))


@pytest.mark.parametrize("known", KNOWN_RUNS, ids=lambda known: known.name)
def test_a_known_run_is_predicted_within_a_quarter(known: KnownRun) -> None:
    assert abs(known.error()) <= 0.25


@pytest.mark.parametrize("known", KNOWN_RUNS, ids=lambda known: known.name)
def test_a_known_run_is_described_as_it_was_run(known: KnownRun) -> None:
    assert known.run.global_batch_size % (known.micro_batch_size * known.num_gpus) == 0
    assert known.source.startswith("https://")
    assert estimate_memory(known.run, known.num_gpus, known.micro_batch_size).peak.total_bytes > 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("GPT-2 124M", 124_439_808),
        ("GPT-2 1558M", 1_557_611_200),
        ("TinyLlama", 1_100_048_384),
        ("lilLM", 39_596_544),
    ],
)
def test_the_models_of_known_runs_have_their_published_sizes(name: str, parameters: int) -> None:
    shape = next(known.run.shape for known in KNOWN_RUNS if known.name.startswith(name))
    assert shape.parameters == parameters


def test_an_error_is_against_the_nearest_end_of_what_is_reported() -> None:
    lillm = KNOWN_RUNS[-1]
    within = KnownRun(**{**vars(lillm), "reported": (lillm.predict() - 1, lillm.predict() + 1)})
    above = KnownRun(**{**vars(lillm), "reported": (lillm.predict() / 3, lillm.predict() / 2)})
    assert (within.error(), above.error()) == (0.0, pytest.approx(1.0))


@pytest.mark.parametrize("page", ["README.md", "docs/planning.md"])
def test_the_table_of_known_runs_is_current(page: str) -> None:
    shown = re.search(r"<!-- known runs -->\n(.*?)<!-- end of known runs -->", (ROOT / page).read_text(), re.DOTALL)
    assert shown
    assert shown[1] == GENERATE["known_runs_table"](), "run python docs/generate.py"


@pytest.mark.parametrize(
    ("gpu", "largest_median", "share_within_a_quarter"),
    [("a100-40gb", 0.06, 1.0), ("a100-80gb", 0.10, 0.95), ("h100-80gb", 0.15, 0.85)],
)
def test_the_published_throughputs_of_many_models_are_met(
    gpu: str, largest_median: float, share_within_a_quarter: float
) -> None:
    errors = errors_of(gpu)
    assert median(errors) <= largest_median
    assert sum(error <= 0.25 for error in errors) >= share_within_a_quarter * len(errors)


def test_the_page_states_the_errors_against_the_published_throughputs() -> None:
    text = PLANNING.read_text()
    for gpu, rows in ROWS.items():
        errors = errors_of(gpu)
        cells = f"| {gpu} | {len(rows)} | {median(errors):.0%} | {max(errors):.0%} |"
        assert cells in text, cells


def errors_of(gpu: str) -> list[float]:
    return [abs(predicted(row, gpu) / row.tokens_per_second_per_gpu - 1) for row in ROWS[gpu]]
