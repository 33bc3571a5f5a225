"""Specs from files: what is read, what is refused, and that every problem is told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from spec_strategies import documents, specs

from dsllm.errors import SpecError, UserError
from dsllm.spec.load import dump_spec, load_spec, parse_spec
from dsllm.spec.sections import Spec
from dsllm.spec.yaml_text import parse_json, parse_yaml

MINIMAL = """
name: small
model: {family: gpt2, num_layers: 2, hidden_size: 64, num_attention_heads: 4, max_position_embeddings: 128}
tokenizer: {kind: sentencepiece, vocab_size: 512}
data: {sources: [{kind: python-stdlib}]}
batch: {sequence_length: 128, global_batch_size: 8, micro_batch_size: 4}
training: {train_steps: 10}
"""


def problems(*overrides: str, tmp_path: Path) -> list[str]:
    """Every problem of the minimal spec with these overrides."""
    path = tmp_path / "spec.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(SpecError) as refusal:
        load_spec(str(path), overrides)
    return refusal.value.problems


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_read_with_every_default(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(MINIMAL)
    spec = load_spec(str(tmp_path / "spec.yaml"))
    assert (spec.name, spec.seed, spec.zero.stage, spec.vocab_size, spec.train_steps) == ("small", 1337, 2, 512, 10)


def test_a_json_file_reads_like_the_yaml_one(tmp_path: Path) -> None:
    document = parse_yaml(MINIMAL, "spec")
    (tmp_path / "spec.json").write_text(json.dumps(document, indent="\t"))
    assert load_spec(str(tmp_path / "spec.json")) == parse_spec(document)


def test_a_file_goes_before_the_preset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    assert load_spec("quickstart").name == "small"
    assert load_spec("quickstart.yaml").name == "quickstart"


def test_a_missing_spec_says_both_places_and_the_nearest_preset() -> None:
    with pytest.raises(UserError) as refusal:
        load_spec("quikstart.yaml")
    assert str(refusal.value) == (
        "quikstart.yaml: there is no such file, and no preset of that name; did you mean quickstart?"
    )
    with pytest.raises(UserError, match="presets are 1b, gpt2-124m, "):
        load_spec("nothing/like/it")


def test_a_folder_is_no_spec(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder; give the spec file in it"):
        load_spec(str(tmp_path))


def test_a_folder_beside_hides_no_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_spec("quickstart").name == "quickstart"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "given empty; a spec is a mapping of the sections name, seed, model"),
        (b"- 1", "given a list; a spec is a mapping of the sections"),
        (b"name: [", "not valid YAML: .* \\(line 1\\)"),
        (b"name: a\nname: b", "not valid YAML: key 'name' is given twice; keep one \\(line 2\\)"),
        (b"name: !!python/name:os.system", "not valid YAML: could not determine a constructor"),
        (b"name: \xff", "not UTF-8 text at byte 6; save the file as UTF-8"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "spec.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_spec(str(tmp_path / "spec.yaml"))


def test_a_key_given_twice_in_json_is_refused() -> None:
    with pytest.raises(UserError, match="key 'a' is given twice; keep one"):
        parse_json('{"a": 1, "a": 2}', "spec.json")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20e9", 20_000_000_000),
        ("2.5e3", 2500),
        ("2e-4", 2e-4),
        ("1e+2", 100),
        (".5", 0.5),
        ("65536.0", 65536.0),
        ("100_000", 100_000),
        ("0.1.2", "0.1.2"),
        ("12:30", "12:30"),
        ("off", "off"),
        ("true", True),
        ("~", None),
    ],
)
def test_plain_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read = parse_yaml(text, "text")
    assert read == value
    assert type(read) is type(value)


# --- every problem at once -----------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once_across_sections_and_rules() -> None:
    with pytest.raises(SpecError) as refusal:
        parse_spec(
            {
                "name": "x",
                "model": {"family": "gpt2", "num_layers": 2, "hidden_size": 65, "num_attention_heads": 4},
                "tokenizer": {"kind": "sentencepiece"},
                "data": {"sources": []},
                "batch": {"sequence_length": 128, "global_batch_size": 8, "micro_batchsize": 4},
                "training": {},
                "zero": {"stage": 1, "offload_param": "cpu"},
            },
            "my.yaml",
        )
    starts = [problem.split(";")[0] for problem in refusal.value.problems]
    assert starts == [
        "data.sources: given []",
        "batch.micro_batchsize: unknown key",
        "model.num_attention_heads: given 4 with hidden_size 65",
        "training: neither tokens nor train_steps is given",
        "zero.offload_param: given cpu at zero.stage 1",
    ]
    assert str(refusal.value).startswith("my.yaml: 5 problems\n  data.sources: given []")


def test_one_problem_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(MINIMAL)
    with pytest.raises(SpecError) as refusal:
        load_spec(str(tmp_path / "spec.yaml"), ["zero.stage=4"])
    assert str(refusal.value).count("\n") == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("zero.stage=4", "zero.stage: given 4; must be a whole number from 0 to 3 (0 nothing, 1 optimizer states"),
        (
            "batch.micro_batch_size=0",
            "batch.micro_batch_size: given 0; must be a whole number greater than 0, or auto (",
        ),
        ("batch.sequence_length='8'", 'batch.sequence_length: given "8"; must be a whole number greater than 0 ('),
        ("seed=true", "seed: given true; must be a whole number at least 0 and less than 4294967296 ("),
        (
            "training.train_steps=2.5",
            "training.train_steps: given 2.5; must be a whole number greater than 0, or null (",
        ),
        ("training.precision=bf8", 'training.precision: given "bf8"; must be one of bf16, fp16, fp32 ('),
        ("training.compile=1", "training.compile: given 1; must be true or false ("),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: given Infinity; must be a number greater than 0 ("),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: missing; must be a number at least 0 and less than 1"),
        ("optimizer.betas=[0.9, 2]", "optimizer.betas.1: given 2; must be a number at least 0 and less than 1"),
        ("zero=3", "zero: given 3; must be a section with stage, offload_optimizer, "),
        ("model=null", "model: given null; must be a section whose family is one of gpt2, llama, "),
        (
            "tokenizer={kind: wordpiece}",
            'tokenizer.kind: given "wordpiece"; must be one of pretrained, sentencepiece, bpe',
        ),
        ("tokenizer={vocab_size: 512}", "tokenizer.kind: missing; must be one of pretrained, sentencepiece, bpe"),
        ("data.sources=[{kind: text}]", "data.sources.0.path: missing; must be text (A file, a folder"),
        ("name=a b", 'name: given "a b"; must be text of at most 100 characters that matches ^[A-Za-z0-9]'),
    ],
)
def test_a_wrong_value_is_told_with_the_rule_and_the_meaning(tmp_path: Path, override: str, message: str) -> None:
    (problem,) = problems(override, tmp_path=tmp_path)
    assert problem.startswith(message)


def test_an_unknown_key_suggests_the_nearest_known_one() -> None:
    document = parse_yaml(MINIMAL, "spec")
    document["batch"]["micro_batchsize"] = 4
    document["zero_stage"] = 3
    document["sequence_length"] = 8
    document["model"]["qqq"] = 1
    with pytest.raises(SpecError) as refusal:
        parse_spec(document)
    found = refusal.value.problems
    assert "batch.micro_batchsize: unknown key; did you mean micro_batch_size?" in found
    assert "sequence_length: unknown key; did you mean batch.sequence_length?" in found
    assert any(problem.startswith("model.qqq: unknown key; known are family, init, vocab_size") for problem in found)


def test_a_missing_section_and_field_are_named_with_what_they_are() -> None:
    document = parse_yaml(MINIMAL, "spec")
    del document["data"], document["model"]["num_layers"]
    with pytest.raises(SpecError) as refusal:
        parse_spec(document)
    assert refusal.value.problems == [
        "model.num_layers: missing; must be a whole number greater than 0 (Transformer blocks)",
        "data: missing; must be a section with sources (The text)",
    ]


def test_a_spec_made_in_python_keeps_the_rules_too(tmp_path: Path) -> None:
    spec = parse_spec(parse_yaml(MINIMAL, "spec"))
    fields = {name: getattr(spec, name) for name in Spec.model_fields}
    fields["batch"] = spec.batch.model_copy(update={"sequence_length": 129})
    with pytest.raises(SpecError, match=r"the model reads at most model\.max_position_embeddings = 128"):
        Spec(**fields)


# --- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_apply_in_order(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(MINIMAL)
    overrides = [
        "training.tokens=20e9",
        "optimizer.betas=[0.8, 0.99]",
        "logging.wandb.project=mine",
        "data.sources.0.weight=2",
        "seed=1",
        "seed=2",
    ]
    spec = load_spec(str(tmp_path / "spec.yaml"), overrides)
    assert spec.training.tokens == 20_000_000_000
    assert spec.optimizer.betas == (0.8, 0.99)
    assert spec.logging.wandb is not None
    assert spec.logging.wandb.project == "mine"
    assert spec.data.sources[0].weight == 2.0
    assert spec.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.mbs", "--set batch.mbs: an override is path=value; for example --set batch.micro_batch_size=4"),
        (
            "batch.micro_batchsize=4",
            "--set batch.micro_batchsize: unknown key 'micro_batchsize'; did you mean batch.micro_batch_size?",
        ),
        ("stage=4", "--set stage: unknown key 'stage'; did you mean zero.stage?"),
        ("data.sources.3.weight=1", "--set data.sources.3.weight: no item '3'; the list has 1, counted from 0"),
        ("zero.stage.x=1", "--set zero.stage.x: unknown key 'x'; it holds no keys"),
        ("zero.stage=[", "--set zero.stage: not valid YAML: "),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(tmp_path: Path, override: str, message: str) -> None:
    (problem,) = problems(override, tmp_path=tmp_path)
    assert problem.startswith(message)


def test_faulty_overrides_and_faulty_fields_are_told_together(tmp_path: Path) -> None:
    assert len(problems("nothing=1", "zero.stage=7", tmp_path=tmp_path)) == 2


# --- round trip ----------------------------------------------------------------------------------------------------


@given(specs)
@settings(max_examples=60, deadline=None)
def test_every_spec_dumps_and_loads_back_equal(spec: Spec) -> None:
    assert parse_spec(parse_yaml(dump_spec(spec), "dump")) == spec


@given(documents())
@settings(max_examples=30, deadline=None)
def test_json_and_yaml_mean_the_same(document: dict[str, Any]) -> None:
    assert parse_spec(parse_json(json.dumps(document), "json")) == parse_spec(document)


def test_a_name_that_looks_like_a_number_stays_text() -> None:
    document = parse_yaml(MINIMAL, "spec") | {"name": "20e9"}
    assert parse_spec(parse_yaml(dump_spec(parse_spec(document)), "dump")).name == "20e9"
