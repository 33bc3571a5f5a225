"""Two hundred rows in HellaSwag's format, a model to ask, and what lm-evaluation-harness makes of both.

python -m tests.hellaswag_rows writes its answers to tests/golden/hellaswag.json, where it is installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from dsllm.data.vocabulary import END_OF_TEXT, train_bpe
from dsllm.spec.sections import BpeTokenizer
from tests.small_text import WORDS

GOLDEN = Path(__file__).parent / "golden" / "hellaswag.json"
NUM_ROWS = 200
POSITIONS = 112
"""Fewer than some contexts have tokens."""

_ODDITIES = [
    "naïve",
    "漢字",
    "🙂",
    "  ",
    "[header]",
    "[step]",
    "[substeps]",
    "50%",
    "it's",
    "[open",
    "“so”",
    "{{x}}",
    "\n",
]
_TITLES = [" [title] How to", " [title]", ". [header] "]


def rows(number: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Each row another, the same in every call; their labels are balanced, as numbers and as text by turns."""
    return [_row(index, random.Random(index)) for index in range(number)]


def _row(index: int, source: random.Random) -> dict[str, Any]:
    label = source.choice([0, 1, 2, 3]) if index % 4 == 0 else (index * 7 + index // 4) % 4
    return {
        "ind": index,
        "activity_label": _words(source, 1, 3).title(),
        "ctx_a": _words(source, 4, 160 if index % 23 == 0 else 30) + source.choice(["", *_TITLES]),
        "ctx_b": source.choice(["", "", "he", "a Man in RED", "the woman [step]", " they"]),
        "endings": [_words(source, 1, 12) + source.choice([".", " [title] Finish.", " ", ""]) for _ in range(4)],
        "label": label if index % 2 else str(label),
    }


def _words(source: random.Random, fewest: int, most: int) -> str:
    return " ".join(
        source.choice(_ODDITIES) if source.random() < 0.1 else source.choice(WORDS)
        for _ in range(source.randint(fewest, most))
    )


def write_rows(file: Path, given: list[dict[str, Any]]) -> Path:
    """A line each."""
    file.write_text(
        "".join(json.dumps(row, ensure_ascii=row["ind"] % 3 == 0) + "\n" for row in given), encoding="utf-8"
    )
    return file


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level vocabulary of 600 tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(BpeTokenizer(kind="bpe", vocab_size=600), [" ".join(WORDS)] * 8),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
    )


def model(scale: float) -> PreTrainedModel:
    """A GPT-2 of random weights with this standard deviation, the same on any machine and in any version of torch;
    with 0 all its logits are alike."""
    built = GPT2LMHeadModel(GPT2Config(vocab_size=640, n_positions=POSITIONS, n_embd=48, n_layer=2, n_head=4)).eval()
    numbers = np.random.RandomState(0)
    with torch.no_grad():
        for weight in built.parameters():
            weight.copy_(torch.from_numpy(scale * numbers.standard_normal(tuple(weight.shape))))
    return built


def write_task(folder: Path, file: Path) -> str:
    """lm-evaluation-harness' own task, over the rows of `file`; its name there."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    files = json.dumps({"data_files": {"train": str(file), "validation": str(file)}})
    (folder / "local.yaml").write_text(
        f"include: {own}\ntag: []\ntask: local_hellaswag\ndataset_path: json\ndataset_kwargs: {files}\n"
    )
    return "local_hellaswag"


def harness_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, given: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What lm-evaluation-harness says of each row, in order."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = write_task(folder, write_rows(folder / "rows.jsonl", given))
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        asked = HFLM(model, tokenizer=tokenizer, batch_size=16)
        results = lm_eval.simple_evaluate(asked, tasks=[task], task_manager=manager, bootstrap_iters=0)
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [
        {
            "log_likelihoods": [float(likelihood) for likelihood, _ in sample["filtered_resps"]],
            "acc": sample["acc"],
            "acc_norm": sample["acc_norm"],
        }
        for sample in samples
    ]


def write_golden() -> None:
    """The answers to all rows, with the version that gave them."""
    answers = harness_answers(model(0.3), tokenizer(), rows())
    for answer in answers:
        answer["log_likelihoods"] = [round(likelihood, 3) for likelihood in answer["log_likelihoods"]]
    GOLDEN.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(answer) for answer in answers)
    GOLDEN.write_text(f'{{"lm_eval": "{importlib.metadata.version("lm_eval")}", "items": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    write_golden()
