"""What `dsllm evaluate` has found, as tables and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dsllm.cli.tables import print_table
from dsllm.units import format_text_bytes

if TYPE_CHECKING:
    from dsllm.evaluation.choices import Score
    from dsllm.evaluation.validation import SetLoss

ALL = "all, as the mix"
"""Row of several sets as one number."""


@dataclass
class Report:
    """What was asked of a model, and its answers; what was not asked is empty."""

    source: Path
    step: int | None
    """Steps that the model was trained for; None of an exported folder, which does not say."""
    device: str
    precision: str
    losses: dict[str, SetLoss] = field(default_factory=dict)
    combined: SetLoss | None = None
    hellaswag: Score | None = None
    tasks: dict[str, Any] | None = None
    """As lm-evaluation-harness gives them."""

    def as_json(self) -> dict[str, Any]:
        """Numbers that JSON has not are null."""
        said: dict[str, Any] = {"source": str(self.source), "step": self.step, "device": self.device}
        said["precision"] = self.precision
        if self.combined is not None:
            sets = {label: _loss_as_json(loss) for label, loss in self.losses.items()}
            said["validation"] = {**_loss_as_json(self.combined), "sets": sets}
        if self.hellaswag is not None:
            said["hellaswag"] = _score_as_json(self.hellaswag)
        if self.tasks is not None:
            said["tasks"] = {name: self.tasks.get(name, {}) for name in ("results", "groups", "versions", "n-shot")}
        return said

    def show(self) -> None:
        """Tables on the screen."""
        after = f" after {self.step} steps" if self.step is not None else ""
        typer.echo(f"{self.source}: the model{after}, in {self.precision} on {self.device}")
        if self.combined is not None:
            rows = {**self.losses, **({ALL: self.combined} if len(self.losses) > 1 else {})}
            columns = ("validation on", "loss", "perplexity", "bits a byte", "tokens", "text")
            print_table(columns, [_row(label, loss) for label, loss in rows.items()])
        if self.hellaswag is not None:
            title = f"HellaSwag, {self.hellaswag.items:,} items"
            print_table((title, "right", "standard error"), _score_rows(self.hellaswag))
        if self.tasks is not None:
            print_table(("task", "examples before it", "metric", "value", "standard error"), _task_rows(self.tasks))


def _row(label: str, loss: SetLoss) -> tuple[str, ...]:
    bits = f"{loss.bits_per_byte:.4f}" if loss.bits_per_byte is not None else "unknown"
    text = format_text_bytes(loss.text_bytes) if loss.text_bytes is not None else "unknown"
    return label, f"{loss.loss:.4f}", f"{loss.perplexity:,.2f}", bits, f"{loss.tokens:,}", text


def _score_rows(score: Score) -> list[tuple[str, ...]]:
    shares = {"acc": score.acc, "acc_norm": score.acc_norm}
    return [(name, f"{share:.2%}", f"{score.standard_error(share):.2%}") for name, share in shares.items()]


def _task_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    from dsllm.evaluation.harness import metrics

    def shown(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)

    return [
        (each.task, shown(each.num_fewshot), each.name, shown(each.value), shown(each.standard_error))
        for each in metrics(results)
    ]


def _loss_as_json(loss: SetLoss) -> dict[str, float | int | None]:
    return {
        "val_loss": _number(loss.loss),
        "perplexity": _number(loss.perplexity),
        "bits_per_byte": _number(loss.bits_per_byte),
        "tokens": loss.tokens,
        "text_bytes": loss.text_bytes,
    }


def _score_as_json(score: Score) -> dict[str, float | int | None]:
    return {
        "acc": score.acc,
        "acc_stderr": _number(score.standard_error(score.acc)),
        "acc_norm": score.acc_norm,
        "acc_norm_stderr": _number(score.standard_error(score.acc_norm)),
        "items": score.items,
    }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
