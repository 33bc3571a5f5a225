"""`dsllm evaluate` on a folder that transformers wrote: HellaSwag, tasks of lm-evaluation-harness, and every mistake.

What needs a run of dsllm is in tests/distributed/test_evaluate.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.logging import disable_progress_bar
from typer.testing import CliRunner

from dsllm.cli.app import app
from dsllm.cli.evaluate_report import Report
from dsllm.data.prepare import prepare
from dsllm.errors import DataError, DsllmError, UserError
from tests import hellaswag_rows
from tests.small_text import text_spec, write_corpus
from tests.test_choices import HARNESS_MISSING

NUM_ITEMS = 40


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers wrote, with its tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    hellaswag_rows.tokenizer().save_pretrained(folder)
    hellaswag_rows.model(scale=0.3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hellaswag_rows.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", hellaswag_rows.rows(NUM_ITEMS))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks: their questions, and one whose file is not there."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {"question": f"kali {index}?", "answers": ["mo", "ne", "bada"], "right": index % 3} for index in range(9)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    for task, file in (("local_questions", "questions.jsonl"), ("lost_questions", "gone.jsonl")):
        (folder / f"{task}.yaml").write_text(TASK.format(task=task, file=folder / file))
    return folder


TASK = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: answers
doc_to_target: right
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def dsllm(*words: str | Path) -> str:
    """What is printed; a fault is raised as the entry point would see it."""
    result = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    if isinstance(result.exception, DsllmError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def said(*words: str | Path) -> dict[str, Any]:
    return json.loads(dsllm(*words, "--json"))


# --- what is measured -------------------------------------------------------------------------------------------------


def test_hellaswag_needs_nothing_but_a_model_and_the_file(exported: Path, rows: Path) -> None:
    report = said(exported, "--hellaswag", rows)
    assert set(report) == {"source", "step", "device", "precision", "hellaswag"}
    assert (report["step"], report["precision"]) == (None, "fp32")
    golden = json.loads(hellaswag_rows.GOLDEN.read_text())["items"][:NUM_ITEMS]
    for score in ("acc", "acc_norm"):
        assert report["hellaswag"][score] == pytest.approx(sum(item[score] for item in golden) / NUM_ITEMS)


def test_without_a_terminal_nothing_is_written_beside_the_report(exported: Path, rows: Path) -> None:
    disable_progress_bar()  # as a fresh process has it
    result = CliRunner().invoke(app, ["evaluate", str(exported), "--hellaswag", str(rows), "--items", "2"])
    assert (result.exit_code, result.stderr) == (0, "")


def test_items_and_precision_are_those_that_are_asked_for(exported: Path, rows: Path) -> None:
    report = said(exported, "--hellaswag", rows, "--items", "7", "--precision", "bf16")
    assert (report["hellaswag"]["items"], report["precision"]) == (7, "bf16")


@pytest.fixture(scope="module")
def asked_of_the_harness(exported: Path, rows: Path, tasks: Path) -> dict[str, Any]:
    """One call for all, because the library looks through thousands of tasks at each start. Beside it our own score."""
    pytest.importorskip("lm_eval", reason=HARNESS_MISSING)
    names = f"{hellaswag_rows.write_task(tasks, rows)},local_questions"
    own = ("--hellaswag", rows, "--items", "8")
    return said(exported, "--tasks", names, "--include-path", tasks, "--limit", "8", "--num-fewshot", "0", *own)


def test_the_harness_gives_its_own_hellaswag_the_score_that_ours_has(asked_of_the_harness: dict[str, Any]) -> None:
    theirs, own = asked_of_the_harness["tasks"]["results"]["local_hellaswag"], asked_of_the_harness["hellaswag"]
    assert (theirs["acc,none"], theirs["acc_norm,none"]) == pytest.approx((own["acc"], own["acc_norm"]))
    assert theirs["acc_stderr,none"] == pytest.approx(own["acc_stderr"], rel=1e-3)


def test_a_task_of_ones_own_is_asked_within_its_limit(asked_of_the_harness: dict[str, Any]) -> None:
    assert asked_of_the_harness["tasks"]["n-shot"] == {"local_hellaswag": 0, "local_questions": 0}
    assert asked_of_the_harness["tasks"]["results"]["local_questions"]["sample_len"] == 8


@pytest.mark.slow  # the library lists its thousands of tasks anew
def test_a_table_shows_each_metric_of_each_task(
    asked_of_the_harness: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Report(Path("model"), None, "cpu", "fp32", tasks=asked_of_the_harness["tasks"]).show()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    results = asked_of_the_harness["tasks"]["results"]
    assert ["task", "examples", "before", "it", "metric", "value", "standard", "error"] in rows
    for task in ("local_hellaswag", "local_questions"):
        for metric in ("acc", "acc_norm"):
            value, error = (f"{results[task][f'{name},none']:.4f}" for name in (metric, f"{metric}_stderr"))
            assert [task, "0", metric, value, error] in rows


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_source_that_is_nothing_is_refused(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(UserError, match="no such folder; give a run, one of its checkpoints, or an exported folder"):
        dsllm(tmp_path / "gone", "--hellaswag", rows)
    with pytest.raises(UserError, match="no checkpoint there; give a run, its checkpoints, or a global_step<N> folder"):
        dsllm(tmp_path, "--hellaswag", rows)


def test_a_model_alone_with_nothing_to_evaluate_on_is_refused(exported: Path) -> None:
    with pytest.raises(UserError, match="nothing to evaluate on; give --spec, --data, --hellaswag or --tasks"):
        dsllm(exported)


@pytest.mark.parametrize("option", ["--include-path", "--limit", "--num-fewshot"])
def test_options_of_tasks_without_tasks_are_refused(exported: Path, option: str) -> None:
    with pytest.raises(UserError, match=f"{option}: given 3 without --tasks, to which it belongs; give both"):
        dsllm(exported, option, "3")


def test_items_without_hellaswag_are_refused(exported: Path) -> None:
    with pytest.raises(UserError, match="--items: given 3 without --hellaswag, to which it belongs"):
        dsllm(exported, "--items", "3")


def test_a_file_of_rows_that_is_not_there_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("no model")
    with pytest.raises(DataError, match="no such file; give a JSONL file of HellaSwag's rows"):
        dsllm(tmp_path, "--hellaswag", tmp_path / "gone.jsonl")


def test_an_empty_name_of_hellaswag_is_refused(exported: Path) -> None:
    with pytest.raises(DataError, match="hellaswag: given an empty name; give a JSONL file of HellaSwag's rows, or a"):
        dsllm(exported, "--hellaswag", "")


def test_batches_without_a_spec_have_no_size(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--batches: given 2, and without a spec no size of a batch is known; give"):
        dsllm(exported, "--data", tmp_path, "--batches", "2")


def test_overrides_without_a_spec_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--set: nothing to override without --spec; give --spec, or remove --set"):
        dsllm(exported, "--data", tmp_path, "--set", "evaluation.batches=2")


def test_a_folder_without_prepared_tokens_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared data in it; run dsllm data prepare"):
        dsllm(exported, "--data", tmp_path)


def test_tokens_of_the_models_own_tokenizer_are_evaluated_from_their_folder_alone(
    exported: Path, tmp_path: Path
) -> None:
    overrides = (
        f"tokenizer={{kind: pretrained, name: '{exported}'}}",
        "model.vocab_size=640",
        f"data.directory={tmp_path / 'tokens'}",
    )
    spec = text_spec(write_corpus(tmp_path / "corpus"), *overrides)
    manifest = prepare(spec, tmp_path / "tokens", processes=1)
    (only,) = said(exported, "--data", tmp_path / "tokens")["validation"]["sets"].values()
    (source,) = manifest.sources
    assert only["tokens"] == source.streams["validation"].tokens - 1  # the first of a stream is never predicted


def test_a_machine_without_the_harness_is_told_what_to_install(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it raises ModuleNotFoundError
    expected = r"--tasks: given on a machine without lm-evaluation-harness .*; pip install 'dsllm\[harness\]'"
    with pytest.raises(UserError, match=expected):
        dsllm(exported, "--tasks", "arc_easy")


def test_an_unknown_task_names_those_near_it(exported: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval", reason=HARNESS_MISSING)
    words = (exported, "--tasks", "local_question", "--include-path", tasks)
    expected = "--tasks: given 'local_question'; no task .* has that name; near it are local_questions.*; correct"
    with pytest.raises(UserError, match=expected):
        dsllm(*words)


def test_a_folder_of_tasks_that_is_none_is_refused(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=HARNESS_MISSING)
    with pytest.raises(UserError, match=r"--include-path: given .*gone, which is no folder; give one of tasks in"):
        dsllm(exported, "--tasks", "arc_easy", "--include-path", tmp_path / "gone")


@pytest.mark.slow  # the library lists its thousands of tasks anew
def test_a_task_whose_data_are_not_there_is_refused_in_one_line(exported: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval", reason=HARNESS_MISSING)
    with pytest.raises(UserError, match=r"--tasks: given 'lost_questions'; they cannot be loaded \(.*gone") as caught:
        dsllm(exported, "--tasks", "lost_questions", "--include-path", tasks)
    assert len(str(caught.value).splitlines()) == 1


def test_a_gpu_that_is_not_there_is_refused(exported: Path, rows: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="--device: given cuda, and torch finds no GPU here; choose cpu, or auto"):
        dsllm(exported, "--hellaswag", rows, "--device", "cuda")
