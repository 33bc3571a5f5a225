"""What training says of its model and what `dsllm evaluate` says afterwards are one, on any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsllm.checkpoint.convert import convert
from dsllm.checkpoint.export import export_run
from dsllm.cli.app import app
from dsllm.data.shards import read_manifest
from dsllm.errors import UserError
from tests import hellaswag_rows
from tests.distributed.harness import run_python_ranks
from tests.distributed.test_resume import arguments, records
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

ATTEMPTS = Path(__file__).with_name("attempts.py")
STEPS, INTERVAL, NUM_ITEMS = 4, 2, 12
MIX = {"news": 0.75, "code": 0.25}


def settings(folder: Path, *more: str) -> list[str]:
    """A run of two sources and a third to validate on, of which each set ends inside of a batch, in fp32."""
    sources = ", ".join(f"{{kind: text, path: '{folder / name}', weight: {weight}}}" for name, weight in MIX.items())
    validated = f"[{{kind: text, path: '{folder / 'wiki'}'}}]"
    data = f"sources: [{sources}], validation_sources: {validated}, validation_fraction: 0.2"
    rows = f"hellaswag: {{path: '{folder / 'rows.jsonl'}', items: {NUM_ITEMS}, interval: {INTERVAL}}}"
    return [
        f"data={{{data}, directory: '{folder / 'tokens'}', packing: best_fit, mask_documents: true}}",
        "model={family: gpt2, num_layers: 2, hidden_size: 64, num_attention_heads: 4}",
        f"training={{train_steps: {STEPS}, precision: fp32}}",
        f"evaluation={{interval: {INTERVAL}, batches: 3, {rows}}}",
        "optimizer.learning_rate=0.01",
        *more,
    ]


def flags(folder: Path, run: str, stage: int, *more: str) -> list[str]:
    return arguments(folder / "news", folder / run, stage, *settings(folder, *more))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, rows, and runs: at stages 3 and 1 on two ranks, at stage 3 on one."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name, documents, words in (("news", 40, 120), ("code", 30, 96), ("wiki", 7, 24)):
        write_corpus(folder / name, documents=documents, words=words)
    hellaswag_rows.write_rows(folder / "rows.jsonl", hellaswag_rows.rows(NUM_ITEMS + 3))
    (folder / "bad.jsonl").write_text((folder / "rows.jsonl").read_text().replace('"label"', '"lable"', 1))
    return folder


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path) -> list[dict[str, Any]]:
    runs = [
        flags(folder, "two-3", 3),
        flags(folder, "two-1", 1),
        flags(folder, "bad", 3, f"evaluation.hellaswag.path={folder / 'bad.jsonl'}"),
        flags(folder, "short", 3, "model.max_position_embeddings=32"),
    ]
    return run_python_ranks(ATTEMPTS, "attempt_each", {"runs": runs}, num_ranks=2, timeout_seconds=240)[0]


@pytest.fixture(scope="module")
def run(folder: Path, on_two_ranks: list[dict[str, Any]]) -> Path:
    assert [end["status"] for end in on_two_ranks[:2]] == [0, 0], on_two_ranks
    return folder / "two-3"


@pytest.fixture(scope="module")
def run_of_one(folder: Path, run: Path) -> Path:
    (end,) = run_python_ranks(
        ATTEMPTS, "attempt_each", {"runs": [flags(folder, "one-3", 3)]}, num_ranks=1, timeout_seconds=120
    )[0]
    assert end["status"] == 0, end
    return folder / "one-3"


def evaluate(*words: str | Path) -> dict[str, Any]:
    """What the command prints as JSON; a fault is raised as the entry point would see it."""
    result = CliRunner().invoke(app, ["evaluate", *map(str, words), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def losses_of(said: dict[str, Any]) -> dict[str, float]:
    """Of each set by its label, and of all."""
    sets = {label: each["val_loss"] for label, each in said["validation"]["sets"].items()}
    return {**sets, "all": said["validation"]["val_loss"]}


def test_hellaswag_stands_on_its_steps_and_on_the_last_one_within_zero_and_one(run: Path) -> None:
    scored = {record["step"]: record for record in records(run) if "hellaswag_acc" in record}
    assert list(scored) == [2, 4]
    for record in scored.values():
        for score in ("hellaswag_acc", "hellaswag_acc_norm"):
            assert (record[score] * NUM_ITEMS) == pytest.approx(round(record[score] * NUM_ITEMS))


def test_two_ranks_score_as_one_does_and_every_stage_alike(folder: Path, run: Path, run_of_one: Path) -> None:
    names = ("hellaswag_acc", "hellaswag_acc_norm")
    expected = [[record.get(name) for name in names] for record in records(run)]
    for other in (run_of_one, folder / "two-1"):
        assert [[record.get(name) for name in names] for record in records(other)] == expected


def test_the_screen_and_the_dashboards_have_the_scores(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    last = records(run)[-1]
    shown = f"HellaSwag {last['hellaswag_acc']:.1%} ({last['hellaswag_acc_norm']:.1%} normalized)"
    assert shown in (run / "logs" / "rank0.log").read_text()
    events = EventAccumulator(str(run / "logs" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("hellaswag_acc_norm")] == [2, 4]


def test_a_bad_row_ends_a_run_before_its_first_step(folder: Path, on_two_ranks: list[dict[str, Any]]) -> None:
    end = on_two_ranks[2]
    assert (end["status"], end["cause"]) == (2, "user_error")
    assert f"{folder / 'bad.jsonl'}, line 1: no 'label' in it; a row of HellaSwag has one" in end["stderr"]
    assert not (folder / "bad" / "metrics.jsonl").exists()


def test_an_ending_that_the_model_cannot_read_ends_a_run_before_its_first_step(
    folder: Path, on_two_ranks: list[dict[str, Any]]
) -> None:
    end = on_two_ranks[3]
    assert end["status"] == 2
    assert "rows.jsonl, line " in end["stderr"]
    assert "tokens; the model reads 32 at most; leave the item out, or take a model of more positions" in end["stderr"]
    assert not (folder / "short" / "metrics.jsonl").exists()


def test_the_losses_are_those_that_training_wrote(run: Path) -> None:
    last, said = records(run)[-1], evaluate(run, "--batch-size", "5")
    assert losses_of(said) == pytest.approx({**last["val_losses"], "all": last["val_loss"]}, abs=1e-6)
    assert (said["step"], said["device"], said["precision"]) == (STEPS, "cpu", "fp32")
    assert said["validation"]["perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    assert losses_of(evaluate(run / "checkpoints" / "global_step4")) == pytest.approx(losses_of(said), abs=1e-6)


def test_hellaswag_afterwards_is_what_it_was_in_training(folder: Path, run: Path) -> None:
    last = records(run)[-1]
    asked = ("--hellaswag", folder / "rows.jsonl", "--items", NUM_ITEMS)
    said = evaluate(run, "--no-validation", *asked)
    assert "validation" not in said
    score = said["hellaswag"]
    assert (score["acc"], score["acc_norm"]) == (last["hellaswag_acc"], last["hellaswag_acc_norm"])
    assert score["items"] == NUM_ITEMS
    assert score["acc_stderr"] == pytest.approx(math.sqrt(score["acc"] * (1 - score["acc"]) / (NUM_ITEMS - 1)))


def test_over_whole_sets_bytes_are_those_of_the_text_and_bits_a_byte_follow(folder: Path, run: Path) -> None:
    sets = evaluate(run, "--batches", "0")["validation"]["sets"]
    wiki = sets["wiki"]
    text = sum(path.stat().st_size for path in (folder / "wiki").iterdir())
    manifest = read_manifest(folder / "tokens")
    assert wiki["text_bytes"] == text
    assert wiki["tokens"] == manifest.source("wiki").streams["validation"].tokens
    assert wiki["bits_per_byte"] == pytest.approx(wiki["val_loss"] * wiki["tokens"] / text / math.log(2))


def test_several_sets_are_one_number_by_the_shares_of_the_mix(run: Path) -> None:
    said = evaluate(run)["validation"]
    sets = {label: said["sets"][label] for label in MIX}
    losses = {label: each["val_loss"] for label, each in sets.items()}
    widths = {label: each["text_bytes"] / each["tokens"] for label, each in sets.items()}
    assert said["val_loss"] == pytest.approx(sum(MIX[label] * losses[label] for label in MIX))
    bytes_per_token = sum(MIX[label] * widths[label] for label in MIX)
    assert said["bits_per_byte"] == pytest.approx(said["val_loss"] / bytes_per_token / math.log(2))
    assert said["tokens"] == sum(each["tokens"] for each in said["sets"].values())


def test_an_exported_folder_and_a_converted_checkpoint_have_the_same_losses(
    folder: Path, run: Path, tmp_path: Path
) -> None:
    expected = losses_of(evaluate(run))
    export_run(run, tmp_path / "exported")
    exported = evaluate(tmp_path / "exported", "--spec", run / "spec.yaml")
    assert exported["step"] is None
    assert losses_of(exported) == pytest.approx(expected, abs=1e-6)
    universal, _ = convert(run / "checkpoints" / "global_step4", tmp_path / "kept", lambda done, total: None)
    assert losses_of(evaluate(universal)) == pytest.approx(expected, abs=1e-6)
    alone = losses_of(evaluate(tmp_path / "exported", "--data", folder / "tokens"))
    assert alone == pytest.approx(expected, abs=0.2)  # other cuts, and shares by the size of the sources


def test_the_screen_shows_a_row_for_each_set_and_one_for_all(folder: Path, run: Path) -> None:
    words = ["evaluate", run, "--hellaswag", folder / "rows.jsonl", "--items", NUM_ITEMS]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{run}: the model after {STEPS} steps, in fp32 on cpu"
    firsts = [line.split("  ")[0].strip() for line in lines]
    for label in ("validation on", "news", "code", "wiki", "all, as the mix", "HellaSwag, 12 items", "acc", "acc_norm"):
        assert label in firsts
    last = records(run)[-1]
    assert f"{last['val_loss']:.4f}" in result.stdout
    assert f"{last['hellaswag_acc_norm']:.2%}" in result.stdout


def test_tokens_of_another_tokenizer_are_refused(folder: Path, run: Path, tmp_path: Path) -> None:
    hellaswag_rows.tokenizer().save_pretrained(tmp_path / "model")
    hellaswag_rows.model(scale=0.1).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="its tokens were made with another tokenizer than that of "):
        evaluate(tmp_path / "model", "--data", folder / "tokens")


def test_sequences_longer_than_the_model_reads_are_refused(run: Path) -> None:
    longer = ("--set", "batch.sequence_length=2048", "--set", "model.max_position_embeddings=4096")
    with pytest.raises(UserError, match=r"batch\.sequence_length: given 2048; the model of .* reads 1024 tokens"):
        evaluate(run, *longer)
