"""How well memory is predicted: real DeepSpeed engines at every ZeRO stage against `dsllm estimate-memory`.

A row is a run of two steps. Measured is the largest sum of tensor bytes that torch's allocator held at any moment of
forward, backward or step, on any rank; the device's runtime is not in it, nor in the prediction that it is set beside.
On GPUs there are rows of full-sized presets besides, and what the allocator reserved is shown; without one, CPU ranks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
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
# On a GPU: full-sized, with the text and the dashboards of the quick start, which need no network.
PRESETS = {"gpt2-124m": 16, "llama-248m": 8, "1b": 4}
LOCAL = ("data={sources: [{kind: python-stdlib}]}", "logging.wandb=null", "training.loss=chunked")


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
    def spec(self) -> str:
        """What the overrides are for."""
        return self.size if self.size in PRESETS else SPEC

    @property
    def overrides(self) -> list[str]:
        if self.size in PRESETS:
            return [
                *LOCAL,
                f"batch.micro_batch_size={self.micro_batch_size}",
                f"batch.global_batch_size={self.micro_batch_size * self.accumulation * self.ranks}",
                f"training.precision={self.precision}",
                f"training.activation_checkpointing={self.checkpointing}",
                f"zero.stage={self.stage}",
            ]
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


def cases(num_ranks: int, device: str) -> list[Case]:
    """Every combination of family, stage, checkpointing, micro-batch and accumulation; what dominates is dealt out."""
    combinations = list(itertools.product(("gpt2", "llama"), (0, 1, 2, 3), ("none", "full"), (0, 1), (1, 4)))
    kinds = [kind for kind, _ in zip(itertools.cycle(SIZES), combinations, strict=False)]
    random.Random(num_ranks).shuffle(kinds)
    found = []
    for (family, stage, checkpointing, micro, accumulation), (size, precision) in zip(combinations, kinds, strict=True):
        micro_batch_size = SIZES[size, precision].micro_batch_sizes[micro]
        found.append(Case(family, size, precision, stage, num_ranks, checkpointing, micro_batch_size, accumulation))
    if device == "cuda":
        full_sized = itertools.product(PRESETS.items(), (0, 1, 2, 3), ("none", "full"))
        for (preset, micro_batch_size), stage, checkpointing in full_sized:
            found.append(Case(preset, preset, "bf16", stage, num_ranks, checkpointing, micro_batch_size, 2))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, choices=(1, 2), action="append", help="only so many; may be repeated")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="predict anew what an earlier run measured")
    args = parser.parse_args()
    console = Console(width=160)
    device, machine = _device(), describe_machine()
    rows: list[dict[str, Any]] = []
    try:
        if args.measured:
            earlier = json.loads(args.measured.read_text())
            device, machine, rows = earlier["device"], earlier["machine"], predicted_anew(earlier)
        else:
            for num_ranks in args.ranks or _possible_ranks(device):
                chosen = cases(num_ranks, device)
                with console.status(f"{len(chosen)} runs on {num_ranks} ranks"):
                    rows += measure(chosen, num_ranks, device)
    except DsllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    console.print(table(rows, device))
    summary = summarise(rows)
    console.print_json(data=summary)
    results = {"machine": machine, "device": device, **summary, "rows": rows}
    console.print(f"Written to {write_results(f'estimate-accuracy-{device}.json', results)}")
    return 0 if summary["within_bounds"] else 1


def measure(chosen: Sequence[Case], num_ranks: int, device: str) -> list[dict[str, Any]]:
    """A row for each case."""
    with tempfile.TemporaryDirectory() as folder:
        given, output = Path(folder) / "cases.json", Path(folder) / "memory.json"
        given.write_text(json.dumps([{"spec": case.spec, "overrides": case.overrides} for case in chosen]))
        arguments = ["--cases", str(given), "--output", str(output)]
        start_ranks("benchmarks/memory_ranks.py", arguments, num_ranks, Path(folder) / "log", device)
        measured = json.loads(output.read_text())
    return [row(case, worst_rank(on_ranks), device) for case, on_ranks in zip(chosen, measured, strict=True)]


def worst_rank(on_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest peak of each phase, and of what was reserved, over the ranks."""
    peaks = {phase: max(rank["peak_bytes"][phase] for rank in on_ranks) for phase in PHASES}
    reserved = [rank["reserved_bytes"] for rank in on_ranks if rank["reserved_bytes"] is not None]
    return {"phases": peaks, "reserved_bytes": max(reserved, default=None)}


def predicted_anew(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run with today's predictions."""
    names = [field.name for field in fields(Case)]
    return [
        row(Case(**{name: old[name] for name in names}), old["measured"], results["device"]) for old in results["rows"]
    ]


def row(case: Case, measured: dict[str, Any], device: str) -> dict[str, Any]:
    """Predicted beside measured, in bytes; the error is relative to what was measured."""
    run = workload(load_spec(case.spec, case.overrides))
    estimate = estimate_memory(run, case.ranks, case.micro_batch_size, device=device)
    predicted = {phase: estimate.tensor_bytes(phase) for phase in PHASES}
    peak = max(measured["phases"].values())
    return {
        **asdict(case),
        "predicted_bytes": max(predicted.values()),
        "measured_bytes": peak,
        "error": round(max(predicted.values()) / peak - 1, 5),
        "predicted": {"phases": predicted},
        "measured": measured,
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


def table(rows: list[dict[str, Any]], device: str) -> Table:
    titles = ["family", "largest", "type", "ZeRO", "ranks", "ckpt", "micro", "acc", "predicted", "measured", "error"]
    shown = Table(*titles, *PHASES, "reserved", title=f"Largest bytes of tensors, MiB ({device})")
    for row in rows:
        settings = [row["family"], row["size"], row["precision"], row["stage"], row["ranks"], row["checkpointing"]]
        phases = [
            f"{row['predicted']['phases'][phase] / MIB:.1f}/{row['measured']['phases'][phase] / MIB:.1f}"
            for phase in PHASES
        ]
        reserved = row["measured"]["reserved_bytes"]
        shown.add_row(
            *(str(setting) for setting in settings),
            str(row["micro_batch_size"]),
            str(row["accumulation"]),
            f"{row['predicted_bytes'] / MIB:,.1f}",
            f"{row['measured_bytes'] / MIB:,.1f}",
            f"{row['error']:+.1%}",
            *phases,
            "" if reserved is None else f"{reserved / MIB:,.1f}",
        )
    return shown


def _possible_ranks(device: str) -> tuple[int, ...]:
    import torch

    return (1, 2) if device == "cpu" or torch.cuda.device_count() > 1 else (1,)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
