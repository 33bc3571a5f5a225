"""The card of a model: what the Hub reads in front, what is known behind, and nothing of a machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from dsllm.checkpoint.manifest import Manifest
from dsllm.checkpoint.model_card import model_card, public_spec
from dsllm.checkpoint.run_facts import Measured, RunFacts, last_measured
from dsllm.model.build import model_config
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec
from dsllm.spec.yaml_text import parse_yaml

SOURCES = (
    "data.sources=[{kind: huggingface, name: Skylion007/openwebtext, weight: 3},"
    " {kind: huggingface, name: /srv/secret/saved, label: mine, weight: 1}]"
)


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of(load_spec("quickstart"))


def model_of(spec: Spec) -> Any:
    return AutoModelForCausalLM.from_config(model_config(spec))


def facts_of(*overrides: str, measured: dict[str, Measured] | None = None, **passport: Any) -> RunFacts:
    checkpoint = Manifest(step=5, precision="bf16", zero_stage=3, world_size=8, files={})
    return RunFacts(load_spec("quickstart", list(overrides)), checkpoint, passport, measured or {}, None)


def test_the_front_matter_names_what_the_hub_knows(model: Any) -> None:
    init = "model.init={kind: pretrained, name: some-one/base-124m, revision: v2, layers: '0-1,10-11'}"
    card = ModelCard(model_card("m", facts_of(SOURCES, init, init={"is_folder": False}), model))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dsllm", "deepspeed", "llama"],
        "base_model": "some-one/base-124m",
        "datasets": ["Skylion007/openwebtext"],
    }
    assert "| from | the weights of some-one/base-124m at v2, its layers 0-1,10-11 |" in card.text
    assert "parameters, which started from some-one/base-124m and was trained on " in card.text
    assert "pre-trained on" not in card.text


@pytest.mark.parametrize("passport", [{"init": {"is_folder": True}}, {}], ids=["recorded", "not recorded"])
def test_a_folder_is_no_name_on_the_hub_though_it_is_gone(model: Any, passport: dict[str, Any]) -> None:
    for name in ("out/base", "/srv/secret/base", "~/base"):
        text = model_card("m", facts_of(f"model.init={{kind: pretrained, name: {name}}}", **passport), model)
        assert ModelCard(text).data.base_model is None
        assert "/srv" not in text


def test_paths_of_a_machine_are_cut_and_the_rest_of_the_spec_is_whole() -> None:
    samples = 'evaluation.samples={prompts: ["/srv/is text", "~ too"], interval: 10}'
    spec = load_spec(
        "quickstart",
        [
            SOURCES,
            samples,
            "data.directory=/srv/secret/tokens",
            "tokenizer={kind: pretrained, name: ~/secret/gpt2}",
            "model.vocab_size=50257",
        ],
    )
    public = parse_yaml(public_spec(spec), "card")
    assert "secret" not in public_spec(spec)
    assert public["data"]["directory"] == "tokens"
    assert public["tokenizer"]["name"] == "gpt2"
    assert [source["name"] for source in public["data"]["sources"]] == ["Skylion007/openwebtext", "saved"]
    assert public["evaluation"]["samples"]["prompts"] == ["/srv/is text", "~ too"]
    assert public["optimizer"] == spec.model_dump(mode="json")["optimizer"]


def test_a_fence_in_the_spec_does_not_end_its_block(model: Any) -> None:
    facts = facts_of('evaluation.samples={prompts: ["```python"], interval: 10}')
    block = re.search(r"^````yaml\n(.*?)^````$", model_card("m", facts, model), re.MULTILINE | re.DOTALL)
    assert block
    assert parse_yaml(block[1], "card") == facts.spec.model_dump(mode="json")


def test_results_have_the_step_that_each_was_taken_after(model: Any) -> None:
    measured = {
        "loss": Measured(3.21, 5),
        "val_loss": Measured(3.5, 4),
        "val_losses": Measured({"news": 3.0, "co|de": None}, 4),
        "hellaswag_acc": Measured(0.2625, 3),
        "hellaswag_acc_norm": Measured(0.31, 3),
    }
    text = model_card("m", facts_of(measured=measured), model)
    for row in (
        "| loss in training | 3.2100 | 5 |",
        "| validation loss, news | 3.0000 (perplexity 20.09) | 4 |",
        "| validation loss, co\\|de | not finite | 4 |",
        "| validation loss | 3.5000 (perplexity 33.12) | 4 |",
        "| HellaSwag, acc | 26.25% | 3 |",
        "| HellaSwag, acc_norm | 31.00% | 3 |",
    ):
        assert row in text
    assert "HellaSwag" not in model_card("m", facts_of(), model)


def test_shares_are_those_of_the_weights_where_the_tokens_are_not_here(model: Any) -> None:
    text = model_card("m", facts_of(SOURCES), model)
    assert "| openwebtext | huggingface | 75.0% |  |  |" in text
    assert "| mine | huggingface | 25.0% |  |  |" in text


def test_sizes_are_those_of_the_model_and_experts_are_told_apart() -> None:
    shape = "{family: mixtral, num_layers: 2, hidden_size: 64, num_attention_heads: 4, intermediate_size: 96}"
    facts = facts_of(f"model={shape}", "model.num_experts=4", "model.num_experts_per_token=2")
    model = model_of(facts.spec)
    text = model_card("m", facts, model)
    idle = 2 * 2 * (3 * 64 * 96)  # layers, experts beside the two, their three matrices
    total = model.num_parameters()  # the vocabulary needs no padding
    assert f"| parameters | {total:,}, {total - idle:,} of them active for each token |" in text
    assert "| experts | 4; 2 for each token |" in text
    assert "| class | `MixtralForCausalLM` |" in text


def test_rows_that_pad_the_vocabulary_are_told_apart(model: Any) -> None:
    facts = facts_of("tokenizer.vocab_size=4000")
    padded = model_of(facts.spec)
    width = facts.spec.model.hidden_size
    text = model_card("m", facts, padded)
    assert f"| parameters | {padded.num_parameters() - 96 * width:,}; {96 * width:,} more pad the vocabulary |" in text
    assert "| vocabulary | 4,000 tokens in 4,096 rows |" in text
    plain = model_card("m", facts_of(), model)
    assert "active" not in plain
    assert "| experts |" not in plain


@pytest.mark.parametrize(
    ("overrides", "row"),
    [
        (
            ["optimizer={name: muon, gradient_clipping: 0}"],
            "| optimizer | Muon, learning rate 0.02, for the matrices of blocks; for the rest AdamW, learning rate "
            "0.0003, betas 0.9 and 0.95, weight decay 0.1 |",
        ),
        (
            ["optimizer={}"],
            "| optimizer | AdamW, learning rate 0.0003, betas 0.9 and 0.95, weight decay 0.1; gradients clipped at 1 |",
        ),
        (["schedule={name: constant, warmup_steps: 7}"], "| schedule | constant: 7 steps of warm-up |"),
        (["schedule={warmup_steps: 7}"], "| schedule | cosine: 7 steps of warm-up, then to 0.1 of the peak |"),
    ],
)
def test_optimizer_and_schedule_are_those_of_the_spec(model: Any, overrides: list[str], row: str) -> None:
    assert row in model_card("m", facts_of(*overrides), model)


# --- what was measured ------------------------------------------------------------------------------------------------


def test_what_was_measured_is_the_last_of_each_number_up_to_the_step(tmp_path: Path) -> None:
    records = [
        {"step": 1, "loss": 9.0, "val_loss": 8.0},
        {"step": 2, "loss": 7.0, "grad_norm": None},
        {"step": 3, "loss": 5.0, "val_loss": 4.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 4, "lo')
    measured = last_measured(path, 2)
    assert measured["loss"] == Measured(7.0, 2)
    assert measured["val_loss"] == Measured(8.0, 1)
    assert "grad_norm" not in measured
    assert last_measured(path, 9)["val_loss"] == Measured(4.0, 3)
    assert last_measured(tmp_path / "none.jsonl", 9) == {}
