"""Every family trains under DeepSpeed, is exported, and is to plain transformers the model that was trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo2Config

from dsllm.checkpoint.export import export_run, load_any
from dsllm.data.run_samples import open_validation_samples
from dsllm.spec.derived import data_directory
from dsllm.spec.load import load_spec
from tests.distributed.harness import run_python_ranks
from tests.distributed.test_resume import arguments, records
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

STEPS = 10
SMALL = "num_layers: 2, hidden_size: 64, num_attention_heads: 4"
GROUPED = f"{SMALL}, num_key_value_heads: 2"
MIXTRAL = f"family: mixtral, {GROUPED}, num_experts: 4, balance_loss_weight: 0.1"
AUTO = "hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 128"

MODELS = {
    "gpt2": (0, f"family: gpt2, {SMALL}"),
    "llama": (1, f"family: llama, {GROUPED}, head_size: 32, tie_word_embeddings: false"),
    "mistral": (2, f"family: mistral, {GROUPED}, sliding_window: 16"),
    "qwen2": (3, f"family: qwen2, {GROUPED}"),
    "qwen3": (3, f"family: qwen3, {GROUPED}, head_size: 32, rope_theta: 1e6"),
    "mixtral 0": (0, MIXTRAL),
    "mixtral 1": (1, MIXTRAL),
    "mixtral 2": (2, MIXTRAL),
    "mixtral 3": (3, MIXTRAL),
    "auto, written out": (3, f"family: auto, config: {{model_type: gpt_neox, {AUTO}}}"),
    "auto, in a folder": (2, "family: auto, config: {folder}"),
}
"""ZeRO stage and network."""
MIXTRALS = [name for name in MODELS if name.startswith("mixtral")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of ten steps of each network, from one start of DeepSpeed."""
    folder = tmp_path_factory.mktemp("families")
    corpus, source = write_corpus(folder / "corpus"), folder / "olmo2"
    Olmo2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=64
    ).save_pretrained(source)
    paths = {name: folder / name.replace(" ", "-").replace(",", "") for name in [*MODELS, "cut otherwise"]}
    commands = [
        arguments(corpus, paths[name], stage, *settings(network.replace("{folder}", str(source))))
        for name, (stage, network) in MODELS.items()
    ]
    cut = [*settings(MIXTRAL), "batch.micro_batch_size=1", "training.activation_checkpointing=full"]
    commands.append(arguments(corpus, paths["cut otherwise"], 1, *cut))
    ranks = Path(__file__).with_name("attempts.py")
    ends = run_python_ranks(ranks, "attempt_each", {"runs": commands}, num_ranks=2, timeout_seconds=600)[0]
    assert [end["stderr"] for end in ends if end["status"] != 0] == []
    shutil.rmtree(source)  # a run folder is complete by itself
    return paths


def settings(network: str) -> list[str]:
    return [
        f"model={{{network}}}",
        f"training={{train_steps: {STEPS}, precision: fp32}}",
        "checkpoint={interval: 100, keep_last: 1}",
        "evaluation={interval: 100, batches: 2}",
        "optimizer.learning_rate=3e-3",
    ]


@pytest.mark.parametrize("name", MODELS)
def test_every_family_learns(runs: dict[str, Path], name: str) -> None:
    losses = [record["loss"] for record in records(runs[name])]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("name", MODELS)
def test_an_export_has_the_logits_of_the_run_and_its_validation_loss(
    runs: dict[str, Path], name: str, tmp_path: Path
) -> None:
    export_run(runs[name], tmp_path / "export")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    trained, _ = load_any(runs[name])
    ids, labels = validation_batch(runs[name])
    with torch.no_grad():
        logits = plain(input_ids=ids).logits
        assert torch.equal(logits, trained(input_ids=ids).logits)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(loss) == pytest.approx(records(runs[name])[-1]["val_loss"], abs=1e-5)


@pytest.mark.parametrize("name", MIXTRALS)
def test_experts_train_alike_at_every_stage(runs: dict[str, Path], name: str) -> None:
    expected, found = records(runs["mixtral 1"]), records(runs[name])
    for key in ("loss", "balance_loss", "grad_norm"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in expected], rel=1e-3), key


def test_experts_train_alike_however_the_batch_is_cut_and_whether_blocks_are_computed_again(
    runs: dict[str, Path],
) -> None:
    expected, found = records(runs["mixtral 1"]), records(runs["cut otherwise"])
    for key in ("loss", "balance_loss", "grad_norm"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in expected], rel=1e-3), key


def test_only_models_with_experts_record_a_balancing_loss(runs: dict[str, Path]) -> None:
    for name in MODELS:
        assert all(("balance_loss" in record) == (name in MIXTRALS) for record in records(runs[name])), name


def test_a_run_keeps_the_configuration_that_it_was_given_as_a_folder(runs: dict[str, Path]) -> None:
    model = load_spec(str(runs["auto, in a folder"] / "spec.yaml")).model
    assert model.family == "auto"
    assert isinstance(model.config, dict)
    assert (model.config["model_type"], model.config["hidden_size"]) == ("olmo2", 64)


def validation_batch(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples of a run's evaluation, two batches of eight, and their labels."""
    spec = load_spec(str(run / "spec.yaml"))
    (samples,) = open_validation_samples(data_directory(spec), spec.data, spec.batch.sequence_length).values()
    rows = samples.read(np.arange(min(16, len(samples))))
    return torch.from_numpy(rows.inputs), torch.from_numpy(rows.labels)
