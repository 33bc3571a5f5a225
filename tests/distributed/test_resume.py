"""A run that was killed goes on as if it had not been; what it leaves behind can be exported."""

from __future__ import annotations

import json
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from dsllm.checkpoint.export import export_run
from dsllm.checkpoint.layout import LATEST_FILE
from dsllm.data.run_samples import open_validation_samples
from dsllm.spec.load import load_spec
from tests.distributed.harness import ROOT, RankResult, run_python_ranks, run_ranks
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

TRAIN = ROOT / "dsllm" / "train.py"
STEPS, CHECKPOINT_INTERVAL, SEQUENCE_LENGTH = 12, 4, 32
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Runs:
    """Two runs of one spec: one undisturbed, one killed after its first checkpoint and started again."""

    undisturbed: Path
    resumed: Path


def arguments(corpus: Path, run: Path, stage: int, *overrides: str) -> list[str]:
    """A GPT-2 of two layers with dropout, so that random states matter, in bf16."""
    settings = [
        f"data={{sources: [{{kind: text, path: '{corpus}'}}], validation_fraction: 0.1, directory: '{corpus}-tokens'}}",
        "model={family: gpt2, num_layers: 2, hidden_size: 64, num_attention_heads: 4, dropout: 0.1}",
        "tokenizer={kind: sentencepiece, vocab_size: 400}",
        f"batch={{sequence_length: {SEQUENCE_LENGTH}, global_batch_size: 8, micro_batch_size: 2}}",
        f"training={{train_steps: {STEPS}, precision: bf16}}",
        "schedule={warmup_steps: 2}",
        f"zero={{stage: {stage}}}",
        f"checkpoint={{interval: {CHECKPOINT_INTERVAL}, keep_last: 2}}",
        "evaluation={interval: 6, batches: 4}",
        "guards.step_0_checks=false",  # test_step_0.py has them
        *overrides,
    ]
    flags = ["--spec", "quickstart", "--run-dir", str(run)]
    for setting in settings:
        flags += ["--set", setting]
    return flags


def train_and_signal(
    corpus: Path, run: Path, stage: int, number: signal.Signals, after_step: int, *, after_a_save: bool = False
) -> RankResult:
    """Start a run, and send every rank `number` once `after_step` is done, and a checkpoint too if that is asked."""
    results: list[RankResult] = []
    script = [TRAIN, *arguments(corpus, run, stage)]

    def train() -> None:
        results.append(run_ranks(script, num_ranks=2, timeout_seconds=TIMEOUT_SECONDS, check=False))

    launch = threading.Thread(target=train)
    launch.start()
    while launch.is_alive() and not records(run):
        time.sleep(0.02)
    ranks = ranks_of(run)  # looked for early: it takes as long as some steps
    latest = run / "checkpoints" / LATEST_FILE  # written behind training: how many steps later is not known
    while launch.is_alive() and (len(records(run)) < after_step or (after_a_save and not latest.is_file())):
        time.sleep(0.005)
    for process in ranks:
        process.send_signal(number)
    launch.join()
    return results[0]


def ranks_of(run: Path) -> list[psutil.Process]:
    """The processes that train into `run`; the launcher's own name the script too, but not as Python's first word."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(run) in (line := process.info["cmdline"] or []) and "-m" not in line and "deepspeed" not in line[1]
    ]


def records(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def all_runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Runs]:
    """By stage. What need not be killed shares a start of DeepSpeed."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {stage: Runs(folder / f"undisturbed-{stage}", folder / f"killed-{stage}") for stage in (1, 2, 3)}
    train_each([arguments(corpus, run.undisturbed, stage) for stage, run in runs.items()])
    for stage, run in runs.items():
        killed = train_and_signal(corpus, run.resumed, stage, signal.SIGKILL, after_step=6, after_a_save=True)
        assert killed.returncode != 0
        assert 6 <= len(records(run.resumed)) < STEPS, "killed too late to prove anything"
    train_each([arguments(corpus, run.resumed, stage) for stage, run in runs.items()])
    return runs


@pytest.fixture(params=[1, 2, 3], ids=["stage1", "stage2", "stage3"])
def runs(request: pytest.FixtureRequest, all_runs: dict[int, Runs]) -> Runs:
    return all_runs[request.param]


def train_each(runs: list[list[str]]) -> None:
    """Train on two ranks, one run after the other."""
    ends = run_python_ranks(
        Path(__file__).with_name("attempts.py"), "attempt_each", {"runs": runs}, num_ranks=2, timeout_seconds=200
    )[0]
    assert [end["status"] for end in ends] == [0] * len(runs), ends


def test_after_sigkill_losses_and_norms_equal_those_of_an_undisturbed_run_exactly(runs: Runs) -> None:
    expected, resumed = records(runs.undisturbed), records(runs.resumed)
    assert [record["step"] for record in resumed] == list(range(1, STEPS + 1))
    for field in ("loss", "grad_norm", "lr", "tokens"):
        assert [record[field] for record in resumed] == [record[field] for record in expected]
    assert resumed[-1]["val_loss"] == expected[-1]["val_loss"]
    assert "going on from" in (runs.resumed / "logs" / "rank0.log").read_text()


def test_a_run_ends_with_its_memory_predicted_measured_and_compared(runs: Runs) -> None:
    log = (runs.undisturbed / "logs" / "rank0.log").read_text()
    if "memory is not measured on this CPU" in log:
        pytest.skip("no C++ compiler: memory is not counted on this CPU")
    report = json.loads((runs.undisturbed / "memory.json").read_text())
    predicted, measured = report["predicted"]["terms"], report["measured"]["terms"]
    assert report["device"] == "cpu"
    assert measured["parameters_bytes"] == predicted["parameters_bytes"]
    assert measured["optimizer_bytes"] == predicted["optimizer_bytes"]
    # of less than 4 MiB small things count, and dropout's kernels on the CPU; test_estimate.py is strict
    assert predicted["peak_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.15)
    assert "parameters  predicted" in log
    assert records(runs.undisturbed)[-1]["peak_memory_bytes"] == measured["peak_bytes"]


def test_only_the_last_checkpoints_are_kept_and_latest_names_the_newest(runs: Runs) -> None:
    checkpoints = runs.resumed / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["global_step12", "global_step8", "latest"]
    assert (checkpoints / "latest").read_text() == "global_step12"


def test_the_exported_folder_has_the_validation_loss_of_the_run(runs: Runs, corpus: Path, tmp_path: Path) -> None:
    assert export_run(runs.resumed, tmp_path / "exported") == STEPS
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    data = load_spec(str(runs.resumed / "spec.yaml")).data
    (samples,) = open_validation_samples(f"{corpus}-tokens", data, SEQUENCE_LENGTH).values()
    rows = samples.read(np.arange(min(32, len(samples))))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(rows.inputs)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(rows.labels).flatten()).item()
    assert loss == pytest.approx(records(runs.resumed)[-1]["val_loss"], abs=5e-3)
