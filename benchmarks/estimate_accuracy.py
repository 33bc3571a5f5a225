"""How well memory is predicted: real DeepSpeed engines at every ZeRO stage against `dsllm estimate-memory`.

A row is a run of two steps. Measured is the largest sum of tensor bytes that torch's allocator held at any moment of
forward, backward or step, on any rank; the device's runtime is not in it, nor in the prediction that it is set beside.
Of GPUs it takes one and two, with larger models; without one, CPU ranks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import describe_machine, start_ranks, write_results
from rich.console import Console
from rich.table import Table

from dsllm.errors import DsllmError
from dsllm.plan.memory import PHASES, estimate_memory
from dsllm.plan.workload import workload
from dsllm.spec.load import load_spec
from dsllm.units import MIB

SPEC = "quickstart"
MEDIAN_BOUND, WORST_BOUND, UNDER_BOUND = 0.03, 0.08, 0.05


@dataclass(frozen=True)
class Size:
    """A model and a batch in which one kind of memory dominates."""

    layers: int
    width: int
    heads: int
    vocab_size: int
    sequence_length: int
    micro_batch_sizes: tuple[int, int]
    loss: str = "chunked"


# Few CPUs multiply in bf16 at any speed: there the batches are smaller.
SIZES = {
    ("activations", "fp32"): Size(6, 128, 4, 1024, 256, (4, 8)),
    ("activations", "bf16"): Size(6, 64, 4, 1024, 128, (4, 8)),
    ("logits", "fp32"): Size(2, 128, 4, 50257, 128, (2, 6), loss="plain"),
    ("logits", "bf16"): Size(2, 32, 4, 50257, 128, (1, 3), loss="plain"),
    ("states", "fp32"): Size(12, 768, 12, 50257, 16, (1, 2)),  # GPT-2's 124M
    ("states", "bf16"): Size(12, 768, 12, 50257, 4, (1, 2)),
}
GPU_PRESETS = ("gpt2-124m", "llama-248m", "1b")
FULL_SIZED = (
    "data.sources=[{kind: python-stdlib}]",
    "logging.wandb=null",
    "training.tokens=1000000000",
)


@dataclass(frozen=True)
class Case:
    """One run."""

    family: str
    size: str
    precision: str
    stage: int
    ranks: int
    checkpointing: str
    micro_batch_size: int
    accumulation: int

    @property
    def overrides(self) -> list[str]:
        size = SIZES[self.size, self.precision]
        key_value_heads = f", num_key_value_heads: {size.heads // 2}" if self.family == "llama" else ""
        return [
            f"model={{family: {self.family}, num_layers: {size.layers}, hidden_size: {size.width}, "
            f"num_attention_heads: {size.heads}{key_value_heads}, "
            f"max_position_embeddings: {size.sequence_length}}}",
            f"tokenizer={{kind: bpe, vocab_size: {size.vocab_size}}}",
            f"batch={{sequence_length: {size.sequence_length}, micro_batch_size: {self.micro_batch_size}, "
            f"global_batch_size: {self.micro_batch_size * self.accumulation * self.ranks}}}",
            f"training={{train_steps: 100, precision: {self.precision}, loss: {size.loss}, "
            f"activation_checkpointing: {self.checkpointing}}}",
            f"zero={{stage: {self.stage}}}",
        ]


def cases(num_ranks: int) -> list[Case]:
    """Every combination of family, stage, checkpointing, micro-batch and accumulation; sizes and precisions rotate."""
    kinds = list(SIZES)
    combinations = itertools.product(("gpt2", "llama"), (0, 1, 2, 3), ("none", "full"), (0, 1), (1, 4))
    found = []
    # a period that shares no divisor with the combinations' own, so that every kind meets every stage
    for number, (family, stage, checkpointing, micro, accumulation) in enumerate(combinations):
        size, precision = kinds[(number + number // 8 + 3 * num_ranks) % len(kinds)]
        micro_batch_size = SIZES[size, precision].micro_batch_sizes[micro]
        found.append(Case(family, size, precision, stage, num_ranks, checkpointing, micro_batch_size, accumulation))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, choices=(1, 2), action="append", help="only so many; may be repeated")
    parser.add_argument("--only", default="", help="only cases whose name has this text")
    parser.add_argument("--output", default=None, help="name of the file in benchmarks/results")
    args = parser.parse_args()
    console = Console(width=140)
    device = _device()
    rows: list[dict[str, Any]] = []
    try:
        for num_ranks in args.ranks or (1, 2):
            chosen = [case for case in cases(num_ranks) if args.only in _name(case)]
            with console.status(f"{len(chosen)} runs on {num_ranks} ranks"):
                group = measure(chosen, num_ranks, device)
            console.print(table(group, f"{num_ranks} rank(s), {device}"))
            rows += group
    except DsllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    summary = summarise(rows)
    console.print(json.dumps(summary, indent=2))
    if args.output:
        results = {"machine": describe_machine(), "device": device, **summary, "rows": rows}
        console.print(f"Written to {write_results(args.output, results)}")
    return 0 if summary["within_bounds"] else 1


def measure(chosen: Sequence[Case], num_ranks: int, device: str) -> list[dict[str, Any]]:
    """A row for each case."""
    with tempfile.TemporaryDirectory() as folder:
        given, output = Path(folder) / "cases.json", Path(folder) / "memory.json"
        given.write_text(json.dumps([case.overrides for case in chosen]))
        arguments = ["--spec", SPEC, "--cases", str(given), "--output", str(output)]
        start_ranks("benchmarks/memory_ranks.py", arguments, num_ranks, Path(folder) / "log", device)
        measured = json.loads(output.read_text())
    return [row(case, on_ranks, device) for case, on_ranks in zip(chosen, measured, strict=True)]


def row(case: Case, on_ranks: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """Predicted beside measured, in bytes; the error is relative to what was measured."""
    run = workload(load_spec(SPEC, case.overrides))
    estimate = estimate_memory(run, case.ranks, case.micro_batch_size, device=device)
    predicted = {phase: estimate.tensor_bytes(phase) for phase in PHASES}
    measured = {phase: max(rank["peak_bytes"][phase] for rank in on_ranks) for phase in PHASES}
    peak = max(measured.values())
    return {
        **asdict(case),
        "predicted_bytes": max(predicted.values()),
        "measured_bytes": peak,
        "error": max(predicted.values()) / peak - 1,
        "phases": {phase: {"predicted": predicted[phase], "measured": measured[phase]} for phase in PHASES},
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [row["error"] for row in rows]
    median = statistics.median(abs(error) for error in errors)
    worst = max(abs(error) for error in errors)
    return {
        "runs": len(rows),
        "median_error": round(median, 4),
        "worst_error": round(worst, 4),
        "worst_under_prediction": round(-min(0.0, *errors), 4),
        "within_bounds": median <= MEDIAN_BOUND and worst <= WORST_BOUND and -min(errors) <= UNDER_BOUND,
    }


def table(rows: list[dict[str, Any]], title: str) -> Table:
    shown = Table(
        *("family", "largest", "type", "ZeRO", "ckpt", "micro", "acc", "predicted MiB", "measured MiB", "error"),
        *PHASES,
        title=title,
    )
    for row in rows:
        phases = [
            f"{entry['predicted'] / MIB:.1f}/{entry['measured'] / MIB:.1f}" for entry in row["phases"].values()
        ]
        shown.add_row(
            row["family"],
            row["size"],
            row["precision"],
            str(row["stage"]),
            row["checkpointing"],
            str(row["micro_batch_size"]),
            str(row["accumulation"]),
            f"{row['predicted_bytes'] / MIB:,.1f}",
            f"{row['measured_bytes'] / MIB:,.1f}",
            f"{row['error']:+.1%}",
            *phases,
        )
    return shown


def _name(case: Case) -> str:
    return f"{case.family} {case.size} {case.precision} stage{case.stage} {case.checkpointing}"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
