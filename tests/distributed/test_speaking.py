"""A run that writes samples trains as one that does not; what it becomes speaks, and says where it is from."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dsllm.checkpoint.convert import convert
from dsllm.checkpoint.export import export_run, load_any
from dsllm.errors import UserError
from dsllm.model.generate import Sampling, encode_prompt, generate
from dsllm.spec.load import load_spec
from dsllm.spec.yaml_text import parse_yaml
from tests.distributed.harness import ROOT, run_python_ranks
from tests.distributed.test_resume import arguments, records
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

GENERATE = [sys.executable, "-m", "dsllm.cli.app", "generate"]
PROMPTS = ["def main(", "", "höhe 日本"]
STEPS, SAVED_STEP, SAMPLED_STEP, NEW_TOKENS = 4, 2, 3, 6
STAGES = [0, 1, 2, 3]
LLAMA = 2
"""Stage of the run of another family, on several sources, whose samples are the likeliest tokens."""


def flags(corpus: Path, run: Path, stage: int, *overrides: str) -> list[str]:
    """A short run in fp32, with dropout."""
    return arguments(
        corpus,
        run,
        stage,
        f"training={{train_steps: {STEPS}, precision: fp32}}",
        f"checkpoint={{interval: {SAVED_STEP}, keep_last: 3}}",
        *overrides,
    )


def with_samples(**more: Any) -> str:
    settings = {"prompts": PROMPTS, "interval": SAMPLED_STEP, "max_new_tokens": NEW_TOKENS, **more}
    return f"evaluation={json.dumps({'interval': SAVED_STEP, 'batches': 2, 'samples': settings}, ensure_ascii=False)}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speaking")


@pytest.fixture(scope="module")
def ends(folder: Path) -> dict[str, dict[str, Any]]:
    """How each run ended, by its name, all in one start of DeepSpeed."""
    corpus, other = write_corpus(folder / "corpus"), write_corpus(folder / "other", documents=20, words=240)
    sources = [
        {"kind": "text", "path": str(corpus), "weight": 3.0},
        {"kind": "text", "path": str(other), "weight": 1.0},
    ]
    data = {"sources": sources, "validation_fraction": 0.1, "directory": str(folder / "mixed-tokens")}
    llama = "{family: llama, num_layers: 2, hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2}"
    runs = {f"sampled-{stage}": flags(corpus, folder / f"sampled-{stage}", stage, with_samples()) for stage in STAGES}
    runs |= {f"silent-{stage}": flags(corpus, folder / f"silent-{stage}", stage) for stage in (1, 3)}
    runs["llama"] = flags(
        corpus,
        folder / "llama",
        LLAMA,
        with_samples(temperature=0.0),
        f"model={llama}",
        f"data={json.dumps(data)}",
    )
    runs["too-long"] = flags(corpus, folder / "too-long", 1, with_samples(prompts=["fits", "höhe " * 900]))
    file = Path(__file__).with_name("attempts.py")
    given = {"runs": list(runs.values())}
    ended = run_python_ranks(file, "attempt_each", given, num_ranks=2, timeout_seconds=240)[0]
    return dict(zip(runs, ended, strict=True))


@pytest.fixture(scope="module")
def run(folder: Path, ends: dict[str, dict[str, Any]]) -> Path:
    """The Llama run."""
    assert ends["llama"]["status"] == 0, ends["llama"]
    return folder / "llama"


def samples_of(run: Path) -> dict[int, list[dict[str, str]]]:
    """By step."""
    return {record["step"]: record["samples"] for record in records(run) if "samples" in record}


# --- samples in training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_with_samples_trains_exactly_as_one_without(folder: Path, ends, stage: int) -> None:
    assert ends[f"sampled-{stage}"]["status"] == ends[f"silent-{stage}"]["status"] == 0
    sampled, silent = records(folder / f"sampled-{stage}"), records(folder / f"silent-{stage}")
    assert len(silent) == STEPS
    for number in ("loss", "grad_norm", "lr"):
        assert [record[number] for record in sampled] == [record[number] for record in silent]


@pytest.mark.parametrize("stage", STAGES)
def test_samples_are_written_at_their_interval_and_at_the_end(folder: Path, ends, stage: int) -> None:
    assert ends[f"sampled-{stage}"]["status"] == 0, ends[f"sampled-{stage}"]
    samples = samples_of(folder / f"sampled-{stage}")
    assert list(samples) == [SAMPLED_STEP, STEPS]
    for written in samples.values():
        assert [sample["prompt"] for sample in written] == PROMPTS
    assert samples[SAMPLED_STEP] != samples[STEPS]
    assert any(sample["text"] for sample in samples[STEPS])


def test_samples_are_the_same_at_every_stage(folder: Path, ends) -> None:
    first, *others = [samples_of(folder / f"sampled-{stage}") for stage in STAGES]
    assert others == [first] * len(others)


def test_samples_are_shown_on_screen_and_in_tensorboard(folder: Path, ends) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = folder / "sampled-1"
    sample = samples_of(run)[SAMPLED_STEP][0]
    line = json.dumps(sample["prompt"] + sample["text"], ensure_ascii=False)
    assert f"sample at step {SAMPLED_STEP}  {line}\n" in ends["sampled-1"]["stderr"]
    events = EventAccumulator(str(run / "logs" / "tensorboard")).Reload()
    assert [event.step for event in events.Tensors("sample/3/text_summary")] == [SAMPLED_STEP, STEPS]


def test_samples_are_what_the_checkpoint_of_that_step_writes(run: Path) -> None:
    model, tokenizer = load_any(run)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0)
    texts = [generate(model, tokenizer, encode_prompt(tokenizer, p), sampling, seed=1)[0].text for p in PROMPTS]
    assert [sample["text"] for sample in samples_of(run)[STEPS]] == texts


def test_a_prompt_longer_than_the_positions_ends_the_run_before_its_first_step(folder: Path, ends) -> None:
    end = ends["too-long"]
    assert end["status"] == 2
    last = end["stderr"].strip().splitlines()[-1]
    assert re.fullmatch(
        r"evaluation\.samples\.prompts\.1: given \d+ tokens; the model has 1024 positions, and must find room behind "
        r"them; shorten it",
        last,
    )
    assert records(folder / "too-long") == []


# --- what can be spoken to --------------------------------------------------------------------------------------------


def test_every_form_of_a_trained_model_says_the_same(run: Path, folder: Path) -> None:
    checkpoint = run / "checkpoints" / f"global_step{STEPS}"
    beside, _ = convert(checkpoint)
    apart, _ = convert(checkpoint, folder / "archive")
    export_run(run, folder / "spoken-to", "fp32")
    command = [*GENERATE, str(run), "--prompt", "höhe ", "--max-new-tokens", "16", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stderr == ""
    texts = json.loads(result.stdout)["texts"]
    for source in (run / "checkpoints", checkpoint, beside, apart, folder / "spoken-to"):
        model, tokenizer = load_any(source)
        context = encode_prompt(tokenizer, "höhe ")
        texts.append("höhe " + generate(model, tokenizer, context, Sampling(max_new_tokens=16), seed=1337)[0].text)
    assert len(set(texts)) == 1


def test_a_checkpoint_without_its_run_is_refused_with_what_is_missing(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / "checkpoints" / f"global_step{STEPS}"
    shutil.copytree(run / "checkpoints" / f"global_step{STEPS}", alone)
    with pytest.raises(UserError, match=r"there is no spec\.yaml of its run in .*elsewhere; move whole runs"):
        load_any(alone)
    shutil.copy(run / "spec.yaml", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"there is no tokenizer of its run in .*elsewhere; move whole runs"):
        load_any(alone)


# --- the model card ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card(run: Path, folder: Path) -> ModelCard:
    export_run(run, folder / "out" / "small-llama")
    return ModelCard.load(folder / "out" / "small-llama" / "README.md")


def table(card: ModelCard, title: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    section = re.search(rf"^## {title}\n\n((?:\|.*\n)+)", card.text, re.MULTILINE)
    assert section, card.text
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section[1].splitlines()[2:]]
    return {first: rest for first, *rest in rows}


def test_the_front_matter_is_what_the_hub_reads(card: ModelCard) -> None:
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dsllm", "deepspeed", "llama"],
    }


def test_the_code_of_the_card_runs(
    card: ModelCard, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert code
    monkeypatch.chdir(folder / "out")
    exec(code[1], {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_the_card_tells_what_the_run_measured(card: ModelCard, run: Path) -> None:
    last = records(run)[-1]
    results = table(card, "Results")
    assert results["loss in training"] == [f"{last['loss']:.4f}", str(STEPS)]
    for label, loss in last["val_losses"].items():
        assert results[f"validation loss, {label}"][0].startswith(f"{loss:.4f} (perplexity ")
    assert set(last["val_losses"]) == {"corpus", "other"}
    assert results["validation loss"][1] == str(STEPS)
    training = table(card, "Training")
    assert training["steps"] == [f"{STEPS} of {STEPS}"]
    assert training["tokens seen"] == [f"{last['tokens']:,}"]
    assert training["ZeRO stage"] == [str(LLAMA)]
    assert training["ranks"] == ["2 on cpu"]


def test_the_card_tells_the_mix_and_the_versions(card: ModelCard, run: Path) -> None:
    sources = table(card, "Data")
    assert [sources[label][:2] for label in ("corpus", "other")] == [["text", "75.0%"], ["text", "25.0%"]]
    assert all(int(sources["corpus"][column].replace(",", "")) > 0 for column in (2, 3))
    passport = json.loads((run / "passport.json").read_text())
    versions = table(card, "Versions")
    assert versions["torch"] == [passport["packages"]["torch"]]
    assert versions["dsllm"] == [passport["dsllm"]]
    assert passport["data_hash"][:12] in card.text


def test_the_card_holds_the_spec_without_this_machines_folders(card: ModelCard, run: Path, folder: Path) -> None:
    assert str(folder) not in card.content
    block = re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    assert block
    public, spec = parse_yaml(block[1], "card"), load_spec(str(run / "spec.yaml")).model_dump(mode="json")
    assert [source["path"] for source in public["data"].pop("sources")] == ["corpus", "other"]
    assert public["data"].pop("directory") == "mixed-tokens"
    del spec["data"]["sources"], spec["data"]["directory"]
    assert public == spec


def test_the_card_of_an_earlier_checkpoint_tells_its_own_numbers(run: Path, folder: Path) -> None:
    export_run(run / "checkpoints" / f"global_step{SAVED_STEP}", folder / "earlier")
    card = ModelCard.load(folder / "earlier" / "README.md")
    record = records(run)[SAVED_STEP - 1]
    assert table(card, "Training")["steps"] == [f"{SAVED_STEP} of {STEPS}"]
    assert table(card, "Training")["tokens seen"] == [f"{record['tokens']:,}"]
    assert table(card, "Results")["loss in training"] == [f"{record['loss']:.4f}", str(SAVED_STEP)]
    assert table(card, "Results")["validation loss"][1] == str(SAVED_STEP)


def test_the_card_of_a_checkpoint_that_left_its_run_leaves_out_what_is_not_known(run: Path, tmp_path: Path) -> None:
    convert(run / "checkpoints" / f"global_step{STEPS}", tmp_path / "kept")
    (tmp_path / "kept" / "passport.json").unlink()
    export_run(tmp_path / "kept", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "## Results" not in card.text
    assert "## Versions" not in card.text
    assert "SHA-256" not in card.text
    assert "ranks" not in table(card, "Training")
    assert table(card, "Data")["corpus"] == ["text", "75.0%", "", ""]  # by its weight; the tokens could be others
