"""The numbers of a step reach every place that the spec names, once each, and a dashboard never ends a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from dsllm.engine import metrics
from dsllm.engine.allocators import allocator
from dsllm.engine.memory_meter import MemoryMeter
from dsllm.engine.metrics import (
    Recorder,
    jsonl_sink,
    open_recorder,
    peak_memory_bytes,
    recent_losses,
    scalars,
    tensorboard_sink,
    wandb_sink,
)
from dsllm.engine.progress import ProgressReport
from dsllm.engine.ranks import World
from dsllm.engine.run_folder import RunFolder
from dsllm.plan.batch import resolve_batch
from dsllm.plan.model_shape import model_shape
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec, Wandb

SAMPLES = [{"prompt": "def", "text": " höhe(self):\n    return 1"}, {"prompt": "", "text": "```\n# x"}]
KEYS = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "peak_memory_bytes"}
TOKENS_PER_STEP = 4096


def step_record(step: int, **more: Any) -> dict[str, Any]:
    """What the loop hands over."""
    return {"step": step, "lr": 1e-3, "loss": 7.0 - step / 100, "grad_norm": 1.5, "step_seconds": 0.5, **more}


def quickstart(*overrides: str) -> Spec:
    return load_spec("quickstart", ["logging.tensorboard=false", *overrides])


def record_steps(spec: Spec, folder: RunFolder, first: int, last: int, rank: int = 0) -> None:
    """The steps after `first` up to `last` of a run."""
    world = World(rank=rank, size=1, local_size=1)
    with open_recorder(
        spec, model_shape(spec), folder, resolve_batch(spec.batch, 1), world, first, 100, MemoryMeter(None)
    ) as record:
        for step in range(first + 1, last + 1):
            record(step_record(step))


def recorder_to(sink: metrics.Sink, **numbers: Any) -> Recorder:
    """A recorder with one place to write to."""
    known = {"tokens_per_step": 8, "flops_per_token": 1, "peak_flops": None, "memory": MemoryMeter(None)}
    return Recorder(lambda step: [sink], 0, **{**known, **numbers})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def lines_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def test_a_step_is_one_object_with_the_promised_keys(folder: RunFolder) -> None:
    record_steps(quickstart(), folder, 0, 3)
    records = lines_of(folder)
    assert [set(record) for record in records] == [KEYS] * 3
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [record["tokens"] for record in records] == [4096, 8192, 12288]
    assert records[0]["tokens_per_second"] == TOKENS_PER_STEP / 0.5
    assert all(isinstance(record["peak_memory_bytes"], int) for record in records)


def test_a_validation_loss_stands_on_the_steps_that_have_one(folder: RunFolder) -> None:
    sink = jsonl_sink(folder.metrics, 0)
    recorder = recorder_to(sink)
    recorder(step_record(1, val_loss=6.5))
    recorder(step_record(2))
    assert [record.get("val_loss") for record in lines_of(folder)] == [6.5, None]


def test_several_validation_losses_stand_together_under_their_labels(folder: RunFolder) -> None:
    losses = {"news": 4.1, "code": math.nan}
    jsonl_sink(folder.metrics, 0)(step_record(1, val_loss=4.1, val_losses=losses))
    assert lines_of(folder)[0]["val_losses"] == {"news": 4.1, "code": None}  # JSON has no numbers that are none


def test_utilisation_is_the_share_of_the_peak_and_absent_where_that_is_unknown() -> None:
    seen: list[dict[str, Any]] = []
    for peak in (1e12, None):
        recorder_to(seen.append, tokens_per_step=1000, flops_per_token=10**8, peak_flops=peak)(step_record(1))
    assert seen[0]["mfu"] == pytest.approx(2000 * 1e8 / 1e12)
    assert "mfu" not in seen[1]


def test_ranks_other_than_0_write_nothing(folder: RunFolder) -> None:
    record_steps(load_spec("quickstart"), folder, 0, 2, rank=1)
    assert not list(folder.path.iterdir())


def test_a_resume_takes_out_the_steps_that_it_runs_again(folder: RunFolder) -> None:
    record_steps(quickstart(), folder, 0, 7)
    record_steps(quickstart(), folder, 4, 6)
    assert [record["step"] for record in lines_of(folder)] == [1, 2, 3, 4, 5, 6]


def test_going_back_takes_out_the_steps_that_are_done_again_and_tensorboard_hides_them(folder: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec, world = load_spec("quickstart"), World(rank=0, size=1, local_size=1)
    with open_recorder(
        spec, model_shape(spec), folder, resolve_batch(spec.batch, 1), world, 0, 100, MemoryMeter(None)
    ) as record:
        for step in range(1, 8):
            record(step_record(step))
        record.go_back(4)
        record(step_record(5, loss=1.0))
    assert [record["step"] for record in lines_of(folder)] == [1, 2, 3, 4, 5]
    assert lines_of(folder)[-1]["loss"] == 1.0
    events = EventAccumulator(str(folder.logs / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_recent_losses_are_those_of_the_steps_before_that_are_finite(folder: RunFolder) -> None:
    sink = jsonl_sink(folder.metrics, 0)
    for step in range(1, 9):
        sink(step_record(step, loss=math.nan if step == 5 else float(step)))
    assert recent_losses(folder.metrics, 6, 4) == (3.0, 4.0, 6.0)
    assert recent_losses(folder.metrics, 2, 10) == (1.0, 2.0)
    assert recent_losses(folder.path / "none.jsonl", 6, 4) == ()


@pytest.mark.parametrize(
    "cut", ['{"step": 3, "lo', '{"step": 3, "val": {"a": 1}', "\x00\x00\x00\n", '{"step": }\n', "[]\n"]
)
def test_a_line_that_a_killed_run_left_unfinished_is_dropped(folder: RunFolder, cut: str) -> None:
    record_steps(quickstart(), folder, 0, 2)
    with folder.metrics.open("a") as file:
        file.write(cut)
    record_steps(quickstart(), folder, 2, 3)
    assert [record["step"] for record in lines_of(folder)] == [1, 2, 3]


def test_a_run_from_the_start_begins_an_empty_file(folder: RunFolder) -> None:
    record_steps(quickstart(), folder, 0, 3)
    record_steps(quickstart(), folder, 0, 1)
    assert [record["step"] for record in lines_of(folder)] == [1]
    assert not list(folder.path.glob("*.partial"))


def test_an_infinite_number_is_null_because_json_has_no_infinity(folder: RunFolder) -> None:
    jsonl_sink(folder.metrics, 0)({"step": 1, "grad_norm": math.inf})
    jsonl_sink(folder.metrics, 1)({"step": 2, "grad_norm": 1.0})
    assert [record["grad_norm"] for record in lines_of(folder)] == [None, 1.0]


def test_samples_stand_with_their_step_and_are_no_numbers(folder: RunFolder) -> None:
    record = step_record(1, samples=SAMPLES, val_loss=math.inf)
    jsonl_sink(folder.metrics, 0)(record)
    assert lines_of(folder) == [{**record, "val_loss": None}]
    assert scalars(record) == step_record(1, val_loss=math.inf)


def test_peak_memory_is_that_of_the_process_where_tensors_are_not_counted() -> None:
    assert 2**20 < peak_memory_bytes(MemoryMeter(None)) < 2**40


def test_peak_memory_is_the_largest_of_the_phases() -> None:
    counted = allocator("cpu")
    if counted is None:
        pytest.skip("no C++ compiler: memory is not counted on this CPU")
    memory = MemoryMeter(counted)
    with memory.phase("forward"):
        torch.zeros(3 * 2**20, dtype=torch.uint8)
    with memory.phase("step"):
        torch.zeros(2**20, dtype=torch.uint8)
    assert 3 * 2**20 <= peak_memory_bytes(memory) < 4 * 2**20


def test_counted_memory_serves_matrix_products_in_every_type() -> None:
    counted = allocator("cpu")
    if counted is None:
        pytest.skip("no C++ compiler: memory is not counted on this CPU")
    held_bytes = counted.read().held_bytes
    for dtype in (torch.float32, torch.bfloat16):  # on CPUs with bf16 instructions the latter takes raw memory
        product = torch.ones(4, 32, 64, dtype=dtype) @ torch.ones(64, 64, dtype=dtype)
        assert torch.all(product == 64)
    del product
    assert counted.read().held_bytes == held_bytes


def test_tensorboard_gets_a_scalar_for_each_number_and_forgets_what_a_resume_runs_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, last in ((0, 5), (3, 4)):
        sink = tensorboard_sink(tmp_path, resumed)
        for step in range(resumed + 1, last + 1):
            sink(step_record(step, val_loss=6.0))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"lr", "loss", "grad_norm", "step_seconds", "val_loss"}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_tensorboard_draws_a_curve_for_each_validation_set(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tensorboard_sink(tmp_path, 0)(step_record(1, val_loss=4.5, val_losses={"news": 4.0, "code": 5.0}))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"val_loss", "val_loss/news", "val_loss/code"} <= set(events.Tags()["scalars"])
    assert events.Scalars("val_loss/code")[0].value == 5.0


def test_tensorboard_shows_samples_as_they_are(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tensorboard_sink(tmp_path, 0)(step_record(7, samples=SAMPLES))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "samples" not in events.Tags()["scalars"]
    shown = [events.Tensors(f"sample/{number}/text_summary")[0] for number in (1, 2)]
    assert [event.step for event in shown] == [7, 7]
    texts = [event.tensor_proto.string_val[0].decode() for event in shown]
    assert texts == ["    def höhe(self):\n        return 1", "    ```\n    # x"]


def test_dashboards_get_a_number_for_each_validation_set() -> None:
    assert scalars(step_record(1, val_loss=4.5, val_losses={"news": 4.0, "code": 5.0})) == {
        **step_record(1, val_loss=4.5),
        "val_loss/news": 4.0,
        "val_loss/code": 5.0,
    }


def test_tensorboard_files_lie_in_the_logs_of_the_run(folder: RunFolder) -> None:
    record_steps(load_spec("quickstart"), folder, 0, 1)
    assert list((folder.logs / "tensorboard").glob("events.out.tfevents.*"))


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A home without a key of Weights & Biases, and no trace of a run afterwards."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "NETRC", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.finish()


@pytest.mark.usefixtures("no_key")
def test_without_a_key_weights_and_biases_writes_an_offline_run_into_the_logs(folder: RunFolder) -> None:
    record_steps(quickstart("logging.wandb={project: dsllm}"), folder, 0, 2)
    wandb.finish()
    assert list((folder.logs / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.usefixtures("no_key")
def test_weights_and_biases_gets_samples_as_a_table(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    sink = wandb_sink(folder.logs, "run", Wandb(mode="offline"))
    sink(step_record(1))
    sink(step_record(2, samples=SAMPLES))
    wandb.finish()
    (table,) = (folder.logs / "wandb").glob("offline-run-*/files/media/table/samples_*.table.json")
    document = json.loads(table.read_text())
    assert document["columns"] == ["step", "prompt", "text"]
    assert document["data"] == [[2, sample["prompt"], sample["text"]] for sample in SAMPLES]
    assert "Weights & Biases" not in caplog.text


@pytest.mark.usefixtures("no_key")
def test_a_key_in_the_environment_or_in_netrc_means_online(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metrics._wandb_mode(Wandb()) == "offline"
    (Path.home() / ".netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert metrics._wandb_mode(Wandb()) == "online"
    (Path.home() / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert metrics._wandb_mode(Wandb()) == "online"
    assert metrics._wandb_mode(Wandb(mode="offline")) == "offline"


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize("settings", [Wandb(mode="offline", project="not/a/project"), Wandb(mode="offline")])
def test_weights_and_biases_never_ends_a_run(tmp_path: Path, settings: Wandb) -> None:
    (tmp_path / "a file").write_text("")
    sink = wandb_sink(tmp_path / "a file" / "logs", "run", settings)  # no folder can be made there
    sink(step_record(1))


@pytest.mark.usefixtures("no_key")
def test_a_finished_weights_and_biases_run_loses_the_step_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = wandb_sink(tmp_path, "run", Wandb(mode="offline"))
    wandb.finish()
    sink(step_record(1))
    assert caplog.messages[-1].startswith("Weights & Biases lost step 1: ")


def test_without_a_terminal_progress_is_a_line_with_loss_rate_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    report = ProgressReport(first_step=0, train_steps=10)
    report({**step_record(1), "tokens_per_second": 12_345.0})
    report({**step_record(2), "tokens_per_second": 12_345.0})  # within ten seconds: no line
    report({**step_record(3, val_loss=6.5, mfu=0.4321), "tokens_per_second": 12_345.0})
    report.close()
    first, evaluated = (message.split("  ") for message in caplog.messages)
    assert first[:3] == ["step 1/10", "loss 6.990", "12.3k tokens/s"]
    assert first[3].endswith("s left")
    assert evaluated[:5] == ["step 3/10", "loss 6.970", "val 6.500", "12.3k tokens/s", "MFU 43.2%"]


def test_progress_shows_a_sample_on_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    report = ProgressReport(first_step=0, train_steps=10)
    report({**step_record(3, samples=SAMPLES), "tokens_per_second": 12_345.0})
    report.close()
    assert caplog.messages[1:] == [
        'sample at step 3  "def höhe(self):\\n    return 1"',
        'sample at step 3  "```\\n# x"',
    ]


def test_progress_names_each_validation_set_behind_the_loss_of_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    report = ProgressReport(first_step=0, train_steps=10)
    losses = {"val_loss": 4.56, "val_losses": {"news": 4.1, "code": 5.0}}
    report({**step_record(1, **losses), "tokens_per_second": 12_345.0})
    report.close()
    assert "  val 4.560 (news 4.100, code 5.000)  " in caplog.text
