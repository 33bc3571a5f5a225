"""Tasks of lm-evaluation-harness, run by its own library on a model that is already loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsllm.errors import UserError, one_line


class Metric(NamedTuple):
    """One number of a task or group."""

    task: str
    num_fewshot: int | None
    name: str
    value: Any
    standard_error: float | None


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns, without samples. `names` are tasks, groups, tags or patterns of them;
    `include_path` has tasks of one's own; `limit` is items a task.

    Raises UserError where the library is not installed, a name is unknown, or a task cannot be loaded.
    """
    lm_eval = library()
    manager = _manager(include_path)
    tasks = _load(manager, names)
    # Log-probabilities in fp32 whatever the model computes in: 16 bits have three digits.
    wrapped = lm_eval.models.huggingface.HFLM(
        model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32"
    )
    results: dict[str, Any] = lm_eval.simple_evaluate(
        wrapped, tasks=tasks, task_manager=manager, limit=limit, num_fewshot=num_fewshot, log_samples=False
    )
    return results


def metrics(results: dict[str, Any]) -> Iterator[Metric]:
    """Every number of the results: of each task, and of each group that has some of its own."""
    everything = {**results["results"], **results.get("groups", {})}
    for task, numbers in everything.items():
        for key, value in numbers.items():
            name, _, filtered_by = key.partition(",")
            if filtered_by and not name.endswith("_stderr"):
                error = numbers.get(f"{name}_stderr,{filtered_by}")
                yield Metric(
                    task, results["n-shot"].get(task), name, value, error if isinstance(error, float) else None
                )


def library() -> Any:
    """lm_eval. Raises UserError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
    except ImportError as error:
        raise UserError(
            f"--tasks: given on a machine without lm-evaluation-harness ({error}); pip install 'dsllm[harness]'"
        ) from error
    return lm_eval


def _manager(include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    if not include_path.is_dir():
        raise UserError(f"--include-path: given {include_path}, which is no folder; give one of tasks in YAML")
    return TaskManager(include_path=str(include_path))


def _load(manager: Any, names: Sequence[str]) -> list[Any]:
    """The tasks and groups of these names, each once, with their data."""
    matched = [manager.match_tasks([name]) for name in names]
    for name, found in zip(names, matched, strict=True):
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            suggestion = f"; near it are {', '.join(near)}" if near else ""
            raise UserError(
                f"--tasks: given '{name}'; no task of lm-evaluation-harness has that name{suggestion}; correct it, or "
                f"name the folder of your own tasks with --include-path"
            )
    try:
        loaded = manager.load(list(dict.fromkeys(chain(*matched))))
    except Exception as error:  # of the library, of datasets, of the network: they have no kind in common
        raise UserError(
            f"--tasks: given '{','.join(names)}'; they cannot be loaded ({one_line(error)}); mend the task, or "
            "fetch its data where there is a network"
        ) from error
    inside = set(chain(*loaded.get("group_map", {}).values()))
    everything = {**loaded.get("groups", {}), **loaded["tasks"]}
    return [item for name, item in everything.items() if name not in inside]
