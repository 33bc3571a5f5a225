"""HellaSwag's rows: read and cleaned as lm-evaluation-harness does, and a bad one is named by its line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dsllm.data.hellaswag import Item, cleaned, read_items
from dsllm.errors import DataError
from tests import hellaswag_rows

GOOD = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "endings": ["is using wrap.", "is ripping level tiles off.", "is holding a cube.", "starts pulling up roofing."],
    "label": 3,
}


def write(folder: Path, *lines: Any) -> str:
    """A file whose lines are these: text as it is, anything else as JSON."""
    file = folder / "rows.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return str(file)


def test_a_row_is_its_label_of_activity_both_contexts_and_four_endings(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    (item,) = read_items(file)
    assert item == Item(
        place=f"{file}, line 1",
        context="Roof shingle removal: A man is sitting on a roof. He",
        endings=tuple(GOOD["endings"]),
        label=3,
    )


def test_the_second_context_begins_with_a_capital_and_goes_on_without(tmp_path: Path) -> None:
    (item,) = read_items(write(tmp_path, {**GOOD, "ctx_b": "the man in RED"}))
    assert item.context.endswith(" The man in red")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (" How to bake [title] Heat it. [step] Wait.", "How to bake. Heat it. Wait."),
        ("[header] Choose. [substeps] Look.", " Choose. Look."),
        ("one  two", "one two"),
        ("[open and [nested] end", " end"),
        ("naïve “words” 漢字 🙂", "naïve “words” 漢字 🙂"),
    ],
)
def test_brackets_of_wikihow_go_and_titles_end_a_sentence(text: str, clean: str) -> None:
    assert cleaned(text) == clean


def test_texts_are_cleaned_as_the_harness_cleans_them() -> None:
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils", reason="lm-evaluation-harness is not installed")
    texts = [text for row in hellaswag_rows.rows() for text in (*row["endings"], row["ctx_a"], row["ctx_b"])]
    assert [cleaned(text) for text in texts] == [utils.preprocess(text) for text in texts]


def test_labels_may_be_text_as_on_the_hub_and_blank_lines_are_none(tmp_path: Path) -> None:
    assert [item.label for item in read_items(write(tmp_path, {**GOOD, "label": "0"}, "", GOOD, " "))] == [0, 3]


def test_a_limit_takes_the_first_items_and_reads_no_further(tmp_path: Path) -> None:
    file = write(tmp_path, *({**GOOD, "label": label} for label in range(4)), "no JSON")
    assert [item.label for item in read_items(file, limit=3)] == [0, 1, 2]


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


MALFORMED = {
    "no JSON": ("{'ind': 24}", "not JSON (Expecting property name"),
    "no object": ([1, 2], "not an object; a row of HellaSwag has keys"),
    "no ctx_a": (without("ctx_a"), "no 'ctx_a' in it; a row of HellaSwag has one; mend the line"),
    "no endings": (without("endings"), "no 'endings' in it"),
    "no label": (without("label"), "no 'label' in it"),
    "context of another kind": ({**GOOD, "ctx_b": None}, "'ctx_b' is None; it must be a text"),
    "three endings": ({**GOOD, "endings": GOOD["endings"][:3]}, "given 3 endings; HellaSwag has 4"),
    "endings that are no texts": ({**GOOD, "endings": [1, 2, 3, 4]}, "given endings that are no list of texts"),
    "label too high": (
        {**GOOD, "label": 4},
        "given the label 4; it must be the number of the true ending, from 0 to 3",
    ),
    "label below": ({**GOOD, "label": -1}, "given the label -1"),
    "label kept secret": ({**GOOD, "label": ""}, "given the label ''; it must be the number of the true ending"),
    "label of another kind": ({**GOOD, "label": True}, "given the label True"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_row_is_refused_by_its_line(tmp_path: Path, kind: str) -> None:
    row, problem = MALFORMED[kind]
    file = write(tmp_path, GOOD, "", row, GOOD)
    with pytest.raises(DataError, match=re.escape(f"{file}, line 3: {problem}")) as caught:
        read_items(file)
    assert len(str(caught.value).splitlines()) == 1


def test_a_line_that_is_not_utf8_is_refused_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(DataError, match=re.escape(f"{file}, line 2: not JSON ('utf-8' codec")):
        read_items(str(file))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: no item in it; HellaSwag has one in each row"):
        read_items(write(tmp_path))


@pytest.mark.parametrize("path", ["/no/such/rows", "./rows", "rows.jsonl", "~/no/such/rows"])
def test_a_file_that_is_not_there_is_refused(path: str) -> None:
    with pytest.raises(DataError, match="no such file; give a JSONL file of HellaSwag's rows, or a dataset's name"):
        read_items(path)


def test_a_dataset_that_cannot_be_loaded_is_refused_in_one_line() -> None:
    with pytest.raises(
        DataError, match="no-owner/no-rows: no such file, and as a dataset it cannot be loaded"
    ) as caught:
        read_items("no-owner/no-rows")
    assert len(str(caught.value).splitlines()) == 1


def test_a_dataset_is_asked_by_its_validation_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of JSONL files is a dataset too, as the library has it: what the Hub gives takes the same way."""
    folder = tmp_path / "owner" / "rows"
    folder.mkdir(parents=True)
    for split, label in (("train", 1), ("validation", 2)):
        (folder / f"{split}.jsonl").write_text(json.dumps({**GOOD, "label": str(label)}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (item,) = read_items("owner/rows")
    assert (item.place, item.label) == ("owner/rows, row 1", 2)
