"""Numbers that go wrong on one rank of two: told with rank and samples, skipped, rolled back, or the end of the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dsllm.launch.history import read_history
from tests.distributed.guarded_runs import ACCUMULATION, FAULTS, SAVED_STEP, SPIKE_STEP, TRAIN_STEPS
from tests.distributed.harness import run_python_ranks
from tests.distributed.test_resume import arguments, records
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

RUNS = Path(__file__).with_name("guarded_runs.py")
GRADIENT = "transformer.h.1.mlp.c_fc.weight"

CASES = {f"stage {stage}, {precision}": (stage, precision) for stage in range(4) for precision in ("fp32", "bf16")}
SPIKED_STAGES = [1, 3]


def run_faulty_cases(*cases: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Stage, precision and overrides of each."""
    given = [{"stage": stage, "precision": precision, "overrides": rest} for stage, precision, *rest in cases]
    return run_python_ranks(RUNS, "run_faulty_cases", {"cases": given}, num_ranks=2, timeout_seconds=280)[0]


# --- steps that are not finite ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty() -> dict[str, dict[str, Any]]:
    cases = {**CASES, "fp16": (1, "fp16"), "fp16, fixed scale": (3, "fp16", "training.loss_scale=8.0")}
    return dict(zip(cases, run_faulty_cases(*cases.values()), strict=True))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, faulty: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return faulty[request.param]


def test_what_is_not_finite_is_skipped_and_its_rank_is_found(case: dict[str, Any]) -> None:
    faults = case["faulty"]["faults"]
    assert [step for step, fault in enumerate(faults) if fault] == list(FAULTS)
    assert faults[2] == {"outcome": "skipped", "losses": [], "gradients": {"1": GRADIENT}}
    assert faults[3] == {"outcome": "skipped", "losses": [1], "gradients": {}}


def test_a_skipped_step_leaves_no_trace_in_weights_moments_or_accumulated_gradients(case: dict[str, Any]) -> None:
    faulty, spared = case["faulty"], case["spared"]
    assert faulty["digests"][1] == faulty["digests"][2] == faulty["digests"][3]
    assert len(set(spared["digests"])) == len(spared["digests"])
    taken = [0, 1, 4, 5]
    assert [faulty["losses"][step] for step in taken] == spared["losses"]
    assert [faulty["digests"][step] for step in taken] == spared["digests"]


def test_a_step_that_is_finite_when_it_is_computed_again_is_taken_once(case: dict[str, Any]) -> None:
    assert case["faulty"]["faults"][5] == {"outcome": "recovered", "losses": [], "gradients": {}}
    assert case["faulty"]["digests"][5] == case["spared"]["digests"][-1]
    assert case["faulty"]["global_steps"] == [1, 2, 3, 4, 5, 6]


def test_in_fp16_an_overflow_is_a_fault_only_where_no_lower_loss_scale_can_mend_it(faulty) -> None:
    dynamic, fixed = faulty["fp16"]["faulty"], faulty["fp16, fixed scale"]["faulty"]
    assert [step for step, fault in enumerate(dynamic["faults"]) if fault] == [3]
    assert dynamic["faults"][3]["losses"] == [1]
    assert dynamic["digests"][1] == dynamic["digests"][2]
    assert fixed["faults"][2]["gradients"] == {"1": GRADIENT}


@pytest.mark.slow  # DeepSpeed's CPUAdam is compiled at the first start, a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="CPUAdam is compiled, and there is no g++")
def test_a_skipped_step_leaves_no_trace_where_the_optimizer_is_on_the_host() -> None:
    for run in run_faulty_cases(*[(stage, "bf16", "zero.offload_optimizer=cpu") for stage in (1, 2, 3)]):
        assert [step for step, fault in enumerate(run["faulty"]["faults"]) if fault] == list(FAULTS)
        assert run["faulty"]["digests"][-1] == run["spared"]["digests"][-1]


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guards")


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    """How each run of guarded_runs.tell ended, on each rank."""
    flags = arguments(
        write_corpus(folder / "corpus"),
        folder / "unused",
        1,
        f"training.train_steps={TRAIN_STEPS}",
        "checkpoint.keep_last=4",
        "guards={spike_window: 10, on_spike: roll_back, step_0_checks: false}",
    )
    given = {"flags": flags, "stages": SPIKED_STAGES, "folder": str(folder)}
    return run_python_ranks(RUNS, "tell", given, num_ranks=2, timeout_seconds=240)


def events_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_history(run / "history.jsonl") if event["event"] == name]


def last_line(outcome: dict[str, Any]) -> str:
    assert "Traceback" not in outcome["stderr"]
    return outcome["stderr"].strip().splitlines()[-1]


@pytest.mark.parametrize("stage", SPIKED_STAGES)
def test_a_spike_is_told_and_the_run_rolled_back_to_its_last_checkpoint(told, folder: Path, stage: int) -> None:
    outcome, run = told[0][f"spiked {stage}"]["rolled back"], folder / f"spiked-{stage}"
    assert outcome["status"] == 0, outcome
    assert f"step {SPIKE_STEP}: the loss is " in outcome["stderr"]
    assert "on samples 80 to 87; going back to the last checkpoint" in outcome["stderr"]
    assert f"rolled back from step {SPIKE_STEP} to {SAVED_STEP}; samples 80 to 87 are skipped" in outcome["stderr"]
    (spike,), (rolled_back,) = events_of(run, "spike"), events_of(run, "rolled_back")
    assert (spike["step"], spike["samples"]) == (SPIKE_STEP, [80, 87])
    assert (rolled_back["to_step"], rolled_back["skipped_batches"]) == (SAVED_STEP, [SPIKE_STEP - 1])
    assert [record["step"] for record in records(run)] == list(range(1, TRAIN_STEPS + 1))


@pytest.mark.parametrize("stage", SPIKED_STAGES)
@pytest.mark.parametrize("rank", [0, 1])
def test_after_a_roll_back_the_samples_of_the_spike_are_not_seen_again(told, stage: int, rank: int) -> None:
    read = by_step(told[rank][f"spiked {stage}"]["rolled back"]["read"])
    order = by_step(told[rank][f"spiked {stage}"]["undisturbed"]["read"])
    assert read[:SPIKE_STEP] == order[:SPIKE_STEP]
    without_spike = order[SAVED_STEP : SPIKE_STEP - 1] + order[SPIKE_STEP:]
    assert read[SPIKE_STEP:][: len(without_spike)] == without_spike
    assert order[SPIKE_STEP - 1] not in read[SPIKE_STEP:]


@pytest.mark.parametrize("stage", SPIKED_STAGES)
def test_a_resume_from_before_the_spike_skips_the_same_samples_and_has_the_same_losses(
    told, folder: Path, stage: int
) -> None:
    run, resumed = folder / f"spiked-{stage}", folder / f"spiked-{stage}-resumed"
    assert told[0][f"spiked {stage}"]["resumed"]["status"] == 0
    assert [record["loss"] for record in records(resumed)] == [record["loss"] for record in records(run)[SAVED_STEP:]]
    undisturbed = [record["loss"] for record in records(folder / f"spiked-{stage}-undisturbed")]
    assert [record["loss"] for record in records(run)[: SPIKE_STEP - 1]] == undisturbed[: SPIKE_STEP - 1]
    assert events_of(resumed, "resumed")[0]["skipped_batches"] == [SPIKE_STEP - 1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("warned", "on samples 80 to 87\n"),
        ("nothing saved", "; the run goes on: there is no checkpoint yet to go back to"),
    ],
)
def test_a_spike_is_only_told_where_the_run_is_not_to_go_back_or_cannot(
    told, folder: Path, name: str, words: str
) -> None:
    outcome = told[0][name]
    run = folder / name.replace(" ", "-")
    assert outcome["status"] == 0
    assert words in outcome["stderr"]
    assert [event["step"] for event in events_of(run, "spike")] == [SPIKE_STEP]
    assert [event["event"] for event in read_history(run / "history.jsonl")] == ["started", "spike", "finished"]


def test_a_run_goes_back_so_often_at_most(told, folder: Path) -> None:
    assert told[0]["too often"]["status"] == 0
    assert "; the run goes on: it went back 1 times, guards.max_roll_backs" in told[0]["too often"]["stderr"]
    events = [event["event"] for event in read_history(folder / "too-often" / "history.jsonl")]
    assert events == ["started", "spike", "rolled_back", "spike", "finished"]


def test_steps_in_a_row_that_are_not_finite_end_the_run_with_rank_and_samples(told, folder: Path) -> None:
    outcome, run = told[0]["not finite"], folder / "not-finite"
    assert outcome["status"] == 1
    assert last_line(outcome).startswith(
        f"step {SPIKE_STEP + 2}: the loss of rank 1 is not finite, on samples 100 to 103; skipped, the weights did not "
        "change; that makes 3 in a row, guards.nonfinite_limit; the run stops"
    )
    faults = events_of(run, "nonfinite")
    assert [(event["step"], event["losses"], event["in_a_row"]) for event in faults] == [
        (SPIKE_STEP, [1], 1),
        (SPIKE_STEP + 1, [1], 2),
        (SPIKE_STEP + 2, [1], 3),
    ]
    assert records(run)[SPIKE_STEP - 1]["loss"] is None


def test_a_save_that_is_due_waits_for_a_step_that_is_finite(told, folder: Path) -> None:
    assert told[0]["not finite"]["status"] == 1
    saved = {path.name for path in (folder / "not-finite" / "checkpoints").glob("global_step*")}
    assert saved == {"global_step4", "global_step8"}  # and not at 12, in the midst of the fault


def by_step(read: list[str]) -> list[tuple[str, ...]]:
    """The micro-batches of each step."""
    return [tuple(read[first : first + ACCUMULATION]) for first in range(0, len(read), ACCUMULATION)]
