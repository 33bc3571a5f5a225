"""HellaSwag (arXiv:1905.07830): beginnings of texts with four endings each, one of them true.

Texts are cleaned as lm-evaluation-harness cleans them (tasks/hellaswag/utils.py there), so that scores compare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsllm.errors import DataError, one_line

NUM_ENDINGS = 4
HUB_SPLIT = "validation"
"""The split of a dataset on the Hub that is asked; that of the test has no labels."""

_TEXTS = ("activity_label", "ctx_a", "ctx_b")
_BRACKETS = re.compile(r"\[.*?\]")


class Item(NamedTuple):
    """A beginning and its endings, cleaned."""

    place: str
    """Where it was read, as messages have it: `hellaswag.jsonl, line 3`."""
    context: str
    endings: tuple[str, ...]
    label: int
    """Which ending is true, from 0."""


def read_items(path: str, limit: int | None = None) -> list[Item]:
    """The first `limit` items (all when None) of a JSONL file, or of a dataset: a folder, or a name on the Hub.

    Raises DataError for what is not there, is empty, or has a row that is none of HellaSwag's, with its line.
    """
    if not path:
        raise DataError("hellaswag: given an empty name; give a JSONL file of HellaSwag's rows, or a dataset's name")
    rows = _rows_of_file(Path(path).expanduser()) if _names_a_file(path) else _rows_of_dataset(path)
    items: list[Item] = []
    for place, row in rows:
        if limit is not None and len(items) == limit:
            break
        items.append(_item(place, row))
    if not items:
        raise DataError(f"{path}: no item in it; HellaSwag has one in each row; give its JSONL file")
    return items


def cleaned(text: str) -> str:
    """Without the marks that WikiHow's headings left: ` [title]` ends a sentence, other brackets go."""
    text = text.strip().replace(" [title]", ". ")
    return _BRACKETS.sub("", text).replace("  ", " ")


def _names_a_file(path: str) -> bool:
    """Names on the Hub are `owner/name`, and what is written as a path is one; but a folder is a dataset too."""
    place = Path(path).expanduser()
    return place.is_file() or (not place.is_dir() and (path[0] in "/.~" or path.endswith(".jsonl")))


def _rows_of_file(file: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its place; blank lines are none."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; give a JSONL file of HellaSwag's rows, or a dataset's name on the Hub")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield (place := f"{file}, line {number}"), _parsed(place, line)


def _parsed(place: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise DataError(f"{place}: not JSON ({error}); a row of HellaSwag is a JSON object; mend the line") from error


def _rows_of_dataset(name: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(str(Path(name).expanduser()), split=HUB_SPLIT)
    except Exception as error:  # of the library, of pyarrow, of the network: they have no kind in common
        raise DataError(
            f"{name}: no such file, and as a dataset it cannot be loaded ({one_line(error)}); correct the name, or "
            "give a JSONL file of HellaSwag's rows"
        ) from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(dataset, 1))


def _item(place: str, row: Any) -> Item:
    """The item of a row. DataError says what is wrong with it."""
    if not isinstance(row, dict):
        raise DataError(f"{place}: not an object; a row of HellaSwag has keys; mend the line")
    missing = [key for key in (*_TEXTS, "endings", "label") if key not in row]
    if missing:
        raise DataError(f"{place}: no {missing[0]!r} in it; a row of HellaSwag has one; mend the line")
    for key in _TEXTS:
        if not isinstance(row[key], str):
            raise DataError(f"{place}: {key!r} is {row[key]!r}; it must be a text; mend the line")
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item(place, cleaned(context), _endings(place, row["endings"]), _label(place, row["label"]))


def _endings(place: str, endings: Any) -> tuple[str, ...]:
    is_list_of_texts = isinstance(endings, list) and all(isinstance(ending, str) for ending in endings)
    if not is_list_of_texts or len(endings) != NUM_ENDINGS:
        given = f"{len(endings)} endings" if is_list_of_texts else "endings that are no list of texts"
        raise DataError(f"{place}: given {given}; HellaSwag has {NUM_ENDINGS}; mend the line")
    return tuple(map(cleaned, endings))


def _label(place: str, label: Any) -> int:
    """A number in the authors' files, a text of digits on the Hub, which is empty where it is kept secret."""
    number = int(label) if isinstance(label, str) and label.isdecimal() else label
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < NUM_ENDINGS:
        raise DataError(
            f"{place}: given the label {label!r}; it must be the number of the true ending, from 0 to "
            f"{NUM_ENDINGS - 1}; mend the line, or give the validation split, whose labels are known"
        )
    return number
