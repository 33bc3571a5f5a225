"""What a step's numbers do to the run: told, counted, the end; with the ranks, the samples and the remedy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dsllm.engine import judge as module
from dsllm.engine.judge import Judge, Past, read_past
from dsllm.engine.metrics import jsonl_sink
from dsllm.engine.nonfinite import Fault
from dsllm.engine.ranks import World
from dsllm.engine.run_folder import RunFolder
from dsllm.errors import TrainingError
from dsllm.launch.history import append_event, read_history
from dsllm.plan.batch import BatchPlan, resolve_batch
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Guards

LOSSES = tuple(3.0 + step % 3 / 50 for step in range(10))
LOSS_OF_1 = Fault("skipped", losses=(1,))
SEVERAL = Fault("skipped", losses=(1,), gradients={0: "wte.weight"})


def plan() -> BatchPlan:
    spec = load_spec("quickstart", ["batch={sequence_length: 32, global_batch_size: 8, micro_batch_size: 2}"])
    return resolve_batch(spec.batch, 2)


def make(folder: Path, past: Past | None = None, **fields: Any) -> Judge:
    guards = Guards(spike_window=10, **fields)
    return Judge(guards, plan(), World(0, 2, 2), RunFolder(folder), past or Past(losses=LOSSES), untrained_loss=6.2)


def skip(judge: Judge, step: int, fault: Fault = LOSS_OF_1) -> bool:
    return judge.goes_back(step, math.nan, math.inf, fault, can_go_back=True)


def test_a_fault_is_told_with_step_ranks_and_each_ranks_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert skip(make(tmp_path), 900, SEVERAL) is False
    assert caplog.messages == [
        "step 900: the gradient of wte.weight on rank 0 is not finite, on samples 7192 to 7195; the loss of rank 1 is "
        "not finite, on samples 7196 to 7199; skipped, the weights did not change"
    ]


def test_samples_are_counted_without_the_batches_that_the_run_skips(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skip(make(tmp_path, Past(skipped_batches=(3, 500))), 900)
    assert "the loss of rank 1 is not finite, on samples 7212 to 7215" in caplog.text


def test_where_only_the_sum_is_not_finite_no_rank_is_blamed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skip(make(tmp_path), 900, Fault("skipped"))
    assert "no rank's own gradients, but their sum over the ranks is not finite, on 7192 to 7199" in caplog.text


def test_so_many_faults_in_a_row_end_the_run_and_a_sound_step_between_does_not(tmp_path: Path) -> None:
    judge = make(tmp_path, nonfinite_limit=2)
    skip(judge, 7)
    assert not judge.is_sound
    judge.goes_back(8, 3.0, 1.0, None, can_go_back=True)
    assert judge.is_sound
    skip(judge, 9)
    with pytest.raises(
        TrainingError, match=r"^step 10: the loss of rank 1 .* makes 2 in a row, guards.nonfinite_limit"
    ):
        skip(judge, 10)
    events = read_history(tmp_path / "history.jsonl")
    assert [(event["event"], event["step"], event["in_a_row"]) for event in events] == [
        ("nonfinite", 7, 1),
        ("nonfinite", 9, 1),
        ("nonfinite", 10, 2),
    ]


def test_a_step_that_was_finite_at_the_second_try_is_told_and_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge = make(tmp_path, nonfinite_limit=1)
    assert skip(judge, 900, Fault("recovered")) is False
    assert judge.is_sound
    assert "when it was computed again from the same samples (7192 to 7199): the step counts" in caplog.text


def test_weights_that_a_fault_spoiled_end_the_run_before_they_are_saved(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"^step 900: .*; the run stops before it saves spoiled weights; resume with"
    ):
        skip(make(tmp_path), 900, Fault("spoiled", gradients={1: "wte.weight"}))


def test_a_step_skipped_for_a_lower_loss_scale_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", module.__name__)
    judge = make(tmp_path, nonfinite_limit=1)
    assert judge.goes_back(900, 3.0, math.inf, None, can_go_back=True) is False
    assert judge.is_sound
    assert caplog.messages == ["step 900: skipped, and the loss scale lowered: gradients exceed fp16's range at it"]


def test_an_absurd_first_loss_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^step 1: the loss is 87\.00, where an untrained model has 6\.20"):
        make(tmp_path).goes_back(1, 87.0, 1.0, None, can_go_back=False)


def test_a_spike_is_told_with_loss_median_score_and_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert make(tmp_path).goes_back(900, 9.0, 1.0, None, can_go_back=True) is False
    assert caplog.messages[0].startswith("step 900: the loss is 9.000, where the median of the last steps is 3.020: ")
    assert caplog.messages[0].endswith("robust deviations, more than guards.spike_threshold 8, on samples 7192 to 7199")
    (event,) = read_history(tmp_path / "history.jsonl")
    assert (event["event"], event["loss"], event["median"], event["samples"]) == ("spike", 9.0, 3.02, [7192, 7199])
    assert event["score"] > 8


@pytest.mark.parametrize(("can_go_back", "past_roll_backs", "goes_back"), [(1, 0, True), (0, 0, False), (1, 3, False)])
def test_a_run_goes_back_where_it_is_to_has_a_checkpoint_and_did_not_too_often(
    tmp_path: Path, can_go_back: bool, past_roll_backs: int, goes_back: bool
) -> None:
    judge = make(tmp_path, Past(num_roll_backs=past_roll_backs, losses=LOSSES), on_spike="roll_back")
    assert judge.goes_back(900, 9.0, 1.0, None, can_go_back) is goes_back


def test_the_past_of_a_run_is_what_it_skips_how_often_it_went_back_and_its_losses(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append_event(folder.history, {"event": "rolled_back", "step": 9, "to_step": 4, "skipped_batches": [8]})
    record = jsonl_sink(folder.metrics, 0)
    for step in range(1, 9):
        record({"step": step, "loss": float(step)})
    assert read_past(folder, 6, 3) == Past((8,), 1, (4.0, 5.0, 6.0))
