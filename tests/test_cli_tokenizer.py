"""`dsllm tokenizer`: what its commands write and print."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from small_text import text_spec, write_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from dsllm.cli.tokenizer import app
from dsllm.data import compression
from dsllm.data.compression import held_out_texts, measure_compression
from dsllm.data.held_out import key_number
from dsllm.data.preparation.recipe import held_out_threshold, open_sources, settle_recipe
from dsllm.data.shards import TOKENIZER_DIRECTORY
from dsllm.data.sources.catalogue import documents
from dsllm.data.token_ids import TOKENIZER_FILE
from dsllm.errors import DataError, UserError
from dsllm.spec.load import dump_spec, load_spec


@pytest.fixture(scope="module")
def spec_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec of 40 small documents, 4 of them held out or so."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "small.yaml").write_text(dump_spec(text_spec(write_corpus(folder / "corpus"))))
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def trained(spec_file: Path) -> tuple[Path, Result]:
    out = spec_file.parent / "trained"
    return out, CliRunner().invoke(app, ["train", str(spec_file), "--out", str(out)])


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_train_prints_the_report_and_how_to_use_the_folder(trained: tuple[Path, Result], spec_file: Path) -> None:
    out, result = trained
    assert result.exit_code == 0
    assert f"{out}: 400 tokens, sentencepiece bpe, trained on 50.0 MB at most" in result.stdout
    assert "bytes a token" in result.stdout
    assert result.stdout.endswith(f"tokenizer: {{kind: pretrained, name: {out}}}\nmodel:\n  vocab_size: 400\n")
    used = load_spec(
        str(spec_file), [f"tokenizer={{kind: pretrained, name: '{out}'}}", "model.vocab_size=400", "name=used"]
    )
    assert used.vocab_size == 400


def test_it_is_the_tokenizer_that_preparation_makes(trained: tuple[Path, Result], spec_file: Path) -> None:
    prepared = spec_file.parent / "prepared"
    prepared.mkdir()
    spec = load_spec(str(spec_file))
    settle_recipe(spec, open_sources(spec), prepared)
    expected = (prepared / TOKENIZER_DIRECTORY / TOKENIZER_FILE).read_bytes()
    assert (trained[0] / TOKENIZER_FILE).read_bytes() == expected


def test_train_again_changes_nothing_and_tells_the_same_as_json(trained: tuple[Path, Result], spec_file: Path) -> None:
    before = (trained[0] / TOKENIZER_FILE).stat().st_mtime_ns
    facts = json.loads(run("train", spec_file, "--out", trained[0], "--json").stdout)
    assert (trained[0] / TOKENIZER_FILE).stat().st_mtime_ns == before
    assert facts["vocab_size"] == facts["in_spec"]["model.vocab_size"] == 400
    measured = facts["compression"]
    assert measured["documents"] == measured["documents_returned"] > 0
    assert measured["bytes_per_token"] == pytest.approx(measured["text_bytes"] / measured["tokens"], abs=1e-6)
    assert measured["fallback_tokens"] == 0


def test_the_folder_is_named_after_the_spec_where_none_is_given(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", spec_file, "--set", "name=other", "--set", "tokenizer.algorithm=unigram").exit_code == 0
    assert [path.name for path in (tmp_path / "tokenizers").iterdir()] == ["other"]


def test_a_folder_of_something_else_is_refused_before_training(spec_file: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run("train", spec_file, "--out", tmp_path)
    assert isinstance(result.exception, UserError)
    assert f"{tmp_path}: holds thesis.txt, which is no tokenizer; choose an empty folder" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_pretrained_tokenizer_is_not_trained(tmp_path: Path) -> None:
    result = run("train", "gpt2-124m", "--out", tmp_path / "out", "--set", "data.sources=[{kind: python-stdlib}]")
    assert isinstance(result.exception, UserError)
    assert "tokenizer.kind: given pretrained, 'gpt2', which is trained already" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_report_compares_tokenizers_on_the_same_text(trained: tuple[Path, Result], spec_file: Path) -> None:
    other = spec_file.parent / "larger"
    run("train", spec_file, "--out", other, "--set", "tokenizer={kind: bpe, vocab_size: 600}")
    result = run("report", trained[0], other, "--spec", spec_file)
    assert result.exit_code == 0
    assert all(str(folder) in result.stdout for folder in (trained[0], other))
    small, large = json.loads(run("report", trained[0], other, "--spec", spec_file, "--json").stdout)
    assert small["text_bytes"] == large["text_bytes"]
    assert small["bytes_per_token"] < large["bytes_per_token"]


def test_report_of_a_name_that_cannot_be_had_says_so(spec_file: Path) -> None:
    result = run("report", "nobody/no-such", "--spec", spec_file)
    assert isinstance(result.exception, DataError)
    assert "given 'nobody/no-such'; it cannot be loaded" in str(result.exception)


def test_bad_lines_stop_until_they_are_to_be_skipped(trained: tuple[Path, Result], tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted(write_corpus(tmp_path / "corpus").iterdir())]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "lines.jsonl").write_text("\n".join([*lines, "{nonsense"]))
    spec = text_spec(tmp_path, f"data.sources=[{{kind: jsonl, path: '{tmp_path / 'lines.jsonl'}'}}]")
    (tmp_path / "lines.yaml").write_text(dump_spec(spec))
    train = ["train", tmp_path / "lines.yaml", "--out", tmp_path / "out"]
    for command in (train, ["report", trained[0], "--spec", tmp_path / "lines.yaml"]):
        stopped = run(*command)
        assert isinstance(stopped.exception, DataError)
        assert "--skip-bad-lines" in str(stopped.exception)
        skipped = run(*command, "--skip-bad-lines")
        assert skipped.exit_code == 0
        assert "bytes a token" in skipped.stdout


def test_without_held_out_text_the_tokenizer_is_trained_but_not_measured(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "SEARCHED_BYTES", 1)
    result = run("train", spec_file, "--out", tmp_path / "out", "--set", "data.validation_fraction=0.01")
    assert result.exit_code == 0
    assert "nothing is held out of the text that was read" in result.stdout
    assert (tmp_path / "out" / TOKENIZER_FILE).is_file()


def test_held_out_text_is_what_training_never_sees(spec_file: Path) -> None:
    spec = load_spec(str(spec_file))
    threshold = held_out_threshold(spec)
    held_out = list(held_out_texts(spec.data, threshold))
    every = list(documents(spec.data.sources[0]))
    assert held_out == [document.text for document in every if key_number(document.key) < threshold]
    assert 0 < len(held_out) < len(every)


def test_held_out_text_is_bounded_and_shared_between_validation_and_training_sources(spec_file: Path) -> None:
    (spec_file.parent / "other.txt").write_text("other text " * 1000)
    source = f"data.validation_sources=[{{kind: text, path: '{spec_file.parent / 'other.txt'}'}}]"
    spec = load_spec(str(spec_file), [source])
    texts = list(held_out_texts(spec.data, held_out_threshold(spec), most_bytes=200))
    assert [len(text.encode()) for text in texts] == [100, 100]
    assert texts[0] == ("other text " * 1000)[:100]


def test_bytes_of_a_character_count_as_fallback(trained: tuple[Path, Result], tmp_path: Path) -> None:
    measured = measure_compression(trained[0], ["da 🙂 da"])
    assert measured is not None
    assert measured.fallback_tokens == len("🙂".encode())
    assert measured.documents_returned == measured.documents == 1
    byte_level = Tokenizer(
        models.BPE({token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.save(str(tmp_path / TOKENIZER_FILE))
    assert measure_compression(tmp_path, ["da 🙂 da"]) == replace(
        measured, tokens=10, vocab_size=256, used_vocabulary=7
    )


def test_text_that_does_not_come_back_is_counted(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "da": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / TOKENIZER_FILE))
    measured = measure_compression(tmp_path, ["da", "da  di"])
    assert measured is not None
    assert (measured.documents, measured.documents_returned) == (2, 1)
    assert measured.fallback_share == pytest.approx(1 / 3)
