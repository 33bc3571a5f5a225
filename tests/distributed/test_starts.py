"""Runs that start from an existing model train on with its loss, at every stage, and need it only once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.harness import run_python_ranks
from tests.distributed.reference import train_reference
from tests.distributed.small_runs import global_batches, small_spec, warm_up
from tests.distributed.test_resume import records
from tests.small_models import BLOCKS, small_config, spec_model, write_model
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

RANKS = Path(__file__).with_name("start_runs.py")
STEPS = 2
STAGES = (1, 2, 3)
CASES = [(family, stage) for family in BLOCKS for stage in STAGES]
UNPADDED = "model.vocab_padding_multiple=1"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, and one of a model that is large beside any of its parameters."""
    folder = tmp_path_factory.mktemp("sources")
    write_model(folder / "large", small_config("gpt2", 8, n_embd=256), 10**7)
    for family in BLOCKS:
        write_model(folder / family, small_config(family))
    return folder


@pytest.fixture(scope="module")
def told(sources: Path) -> list[dict[str, Any]]:
    """What each rank told of every case, from one start of DeepSpeed."""
    cases = [{"stage": stage, "overrides": overrides(family, sources)} for family, stage in CASES]
    large = [spec_model("gpt2", sources / "large", 8), "model.hidden_size=256", UNPADDED]
    arguments = {"cases": cases, "steps": STEPS, "measured": large}
    return run_python_ranks(RANKS, "train_from_each", arguments, num_ranks=2, timeout_seconds=280)


@pytest.fixture(scope="module")
def outcomes(told: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Of each family at each stage, on rank 0."""
    losses = [[outcome["losses"] for outcome in rank["trained"]] for rank in told]
    assert losses[0] == losses[1]
    return dict(zip(CASES, told[0]["trained"], strict=True))


def overrides(family: str, sources: Path) -> list[str]:
    balance = ["model.balance_loss_weight=0"] if family == "mixtral" else []
    return [spec_model(family, sources / family), UNPADDED, *balance]


@pytest.mark.parametrize("family", BLOCKS)
def test_the_first_losses_are_those_that_transformers_computes_at_every_stage(
    outcomes: dict[tuple[str, int], dict[str, Any]], sources: Path, family: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(sources / family, dtype=torch.float32, attn_implementation="sdpa")
    settings = small_spec("gpt2", 0).optimizer
    expected = train_reference(
        model,
        global_batches(STEPS),
        learning_rate=warm_up,
        betas=settings.betas,
        epsilon=settings.epsilon,
        weight_decay=settings.weight_decay,
        gradient_clipping=settings.gradient_clipping,
        micro_batch_size=4,
    ).losses
    for stage in STAGES:
        losses = outcomes[family, stage]["losses"]
        assert losses[0] == pytest.approx(expected[0], abs=1e-5), stage
        assert losses[1] == pytest.approx(expected[1], abs=1e-4), f"after an update at stage {stage}"


def test_every_weight_is_found_as_it_was_read_on_every_rank(outcomes: dict[tuple[str, int], dict[str, Any]]) -> None:
    for outcome in outcomes.values():
        assert outcome["check"]["passed"], outcome["check"]
        assert outcome["check"]["found"].startswith("so in all ")


def test_at_stage_3_no_rank_holds_the_model_while_its_weights_are_set(told: list[dict[str, Any]]) -> None:
    for result in (rank["measured"] for rank in told):
        if result["peak_bytes"] is None:
            pytest.skip("memory is not measured on this CPU")
        # half of it, and the largest parameter whole: 256 x 1024 of 6.4 million
        assert result["whole_bytes"] / 2 <= result["peak_bytes"] < 0.7 * result["whole_bytes"]


def test_every_weight_that_is_set_is_a_tick_for_the_watchdog(told: list[dict[str, Any]]) -> None:
    for result in (rank["measured"] for rank in told):
        assert result["ticks"] == result["parameters"] > 8


def test_a_weight_that_is_not_what_was_read_is_found_on_every_rank(told: list[dict[str, Any]]) -> None:
    for check in (rank["measured"]["check"] for rank in told):
        assert check["passed"] is False
        assert check["found"].startswith("transformer.h.1.mlp.c_fc.weight has mean nan and deviation nan where ")


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ends(folder: Path) -> dict[str, dict[str, Any]]:
    """How each run ended on rank 0."""
    corpus = write_corpus(folder / "corpus", documents=60, words=240)
    settings = [
        f"data={{sources: [{{kind: text, path: '{corpus}'}}], validation_fraction: 0.1, directory: '{corpus}-tokens'}}",
        "tokenizer={kind: sentencepiece, vocab_size: 400}",
        "batch={sequence_length: 64, global_batch_size: 8, micro_batch_size: 4}",
        "training={train_steps: 40, precision: fp32}",
        "optimizer.learning_rate=1e-3",
        "schedule={warmup_steps: 2, name: constant}",
        "zero={stage: 2}",
        "checkpoint={interval: 1000}",
        "evaluation={interval: 4, batches: 4}",
        "logging.tensorboard=false",
        "guards.step_0_checks=false",
    ]
    flags = ["--spec", "quickstart", *[word for setting in settings for word in ("--set", setting)]]
    arguments = {"flags": flags, "folder": str(folder)}
    return run_python_ranks(RANKS, "tell", arguments, num_ranks=2, timeout_seconds=280)[0]


def validation(run: Path) -> list[float]:
    return [record["val_loss"] for record in records(run) if "val_loss" in record]


def log(run: Path) -> str:
    return (run / "logs" / "rank0.log").read_text()


def test_an_up_scaled_model_starts_below_one_from_scratch_and_stays_there(ends: dict[str, Any], folder: Path) -> None:
    assert [ends[name]["status"] for name in ("source", "grown", "scratch", "shrunk")] == [0, 0, 0, 0]
    grown, scratch, shrunk = (validation(folder / name)[:11] for name in ("grown", "scratch", "shrunk"))
    assert len(scratch) == 11
    for one, other in zip(grown, scratch, strict=True):
        assert one < other
    assert grown[0] < scratch[0] - 1.0, "it starts far below"
    assert shrunk[0] < scratch[0] - 1.0


def test_the_log_says_what_was_taken_and_the_passport_keeps_it(ends: dict[str, Any], folder: Path) -> None:
    assert "layers 0-2,1-3 of its 4" in log(folder / "grown")
    assert "; a model that has learned nothing has " in log(folder / "grown")
    init = json.loads((folder / "grown" / "passport.json").read_text())["init"]
    assert (init["kind"], init["name"], init["layers"]) == ("pretrained", str(folder / "out"), "0-2,1-3")
    assert init["is_folder"] is True
    assert len(init["config_sha256"]) == 64
    assert list(init["weight_files"]) == ["model.safetensors"]
    assert json.loads((folder / "scratch" / "passport.json").read_text())["init"] == {"kind": "scratch"}


def test_a_run_goes_on_though_its_source_is_gone_or_elsewhere(ends: dict[str, Any], folder: Path) -> None:
    assert ends["source gone"]["status"] == 0
    assert [record["step"] for record in records(folder / "grown")] == list(range(1, 45))
    assert ends["source moved"]["status"] == 0
    assert f"changed since the checkpoint: model.init.name (was {folder}/out, now {folder}/elsewhere)" in log(
        folder / "grown"
    )
    assert json.loads((folder / "grown" / "passport.json").read_text())["init"]["name"] == str(folder / "out")


def test_a_run_of_other_layers_is_another_run(ends: dict[str, Any]) -> None:
    assert ends["other layers"]["status"] == 2
    assert "model.init.layers (was 0-2,1-3, now 0-2,0-2): that makes it another run" in ends["other layers"]["stderr"]


def test_a_fresh_run_needs_its_source(ends: dict[str, Any], folder: Path) -> None:
    assert ends["start from gone"]["status"] == 2
    assert f"{folder}/out: there is no such folder; " in ends["start from gone"]["stderr"]


def test_another_network_is_refused_with_every_difference(ends: dict[str, Any]) -> None:
    assert ends["wrong width"]["status"] == 2
    message = ends["wrong width"]["stderr"]
    assert "is another network: 3 problems" in message
    assert "model.hidden_size: given 128; " in message
    assert "model.norm_epsilon: given 1e-06; " in message


def test_another_tokenizer_is_refused_before_a_weight_is_read(ends: dict[str, Any]) -> None:
    assert ends["other tokenizer"]["status"] == 2
    assert "tokenizer: token " in ends["other tokenizer"]["stderr"]


def test_a_source_without_a_tokenizer_is_warned_about(ends: dict[str, Any], folder: Path) -> None:
    assert ends["no tokenizer"]["status"] == 0
    assert f"{folder}/out has no tokenizer: whether its tokens are the run's is not checked" in log(folder / "none")
