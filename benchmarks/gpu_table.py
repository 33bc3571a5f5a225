"""`quickstart` and `gpt2-124m` for 50 steps at ZeRO 0 to 3 on one CUDA GPU: speed, memory and loss, nothing changed
but `--set`.

The text is the standard library's source files and the vocabulary is trained on it, so that no network is needed; the
models keep their own shapes. Losses must agree between the stages within LOSS_TOLERANCE at every step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import describe_machine, settled_median, steps_argument, train, write_results
from rich.console import Console
from rich.table import Table

from dsllm.errors import DsllmError
from dsllm.spec.load import load_spec
from dsllm.units import format_bytes

LOSS_TOLERANCE = 3e-2
STAGES = (0, 1, 2, 3)
# gpt2-124m names a Hub dataset and a Hub tokenizer; its embedding keeps GPT-2's own number of rows.
PRESETS = {
    "quickstart": [],
    "gpt2-124m": [
        "data.sources=[{kind: python-stdlib}]",
        "tokenizer={kind: sentencepiece, vocab_size: 8192, training_bytes: 4000000}",
        "model.vocab_size=50257",
        "logging.wandb=null",
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=steps_argument, default=50, help="optimizer steps of each run")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="only this one; may be repeated")
    parser.add_argument("--set", action="append", default=[], help="section.key=value, added to every run")
    args = parser.parse_args()
    console = Console()
    import torch

    if not torch.cuda.is_available():
        print("gpu_table: torch finds no CUDA GPU here; run this on a machine with one", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            presets = args.preset or list(PRESETS)
            rows = [row for preset in presets for row in measure(preset, args, Path(folder), console)]
    except DsllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    console.print(table(rows, card))
    results = {"card": card, "machine": describe_machine(), "steps": args.steps, "overrides": args.set, "runs": rows}
    console.print(f"Written to {write_results('stages-gpu.json', results)}")
    disagreeing = [row for row in rows if row["largest_loss_difference_to_stage_0"] > LOSS_TOLERANCE]
    for row in disagreeing:
        print(
            f"gpu_table: {row['preset']} at ZeRO-{row['zero_stage']}: a loss is "
            f"{row['largest_loss_difference_to_stage_0']:.4f} from that at ZeRO-0; {LOSS_TOLERANCE} is allowed",
            file=sys.stderr,
        )
    return 1 if disagreeing else 0


def measure(preset: str, args: argparse.Namespace, folder: Path, console: Console) -> list[dict[str, Any]]:
    """A row for each stage."""
    overrides = [
        *PRESETS[preset],
        f"training.train_steps={args.steps}",
        f"schedule.warmup_steps={args.steps // 5}",
        f"data.directory={folder / preset / 'data'}",
        *args.set,
    ]
    rows: list[dict[str, Any]] = []
    losses: dict[int, list[float]] = {}
    for stage in STAGES:
        with console.status(f"{preset}, ZeRO-{stage}"):
            metrics = train(preset, [*overrides, f"zero.stage={stage}"], folder / preset / f"zero{stage}", 1, "cuda")
        losses[stage] = [line["loss"] for line in metrics]
        difference = largest_difference(losses[stage], losses[0])
        rows.append(summary(preset, stage, overrides, metrics) | {"largest_loss_difference_to_stage_0": difference})
        console.print(f"{preset}, ZeRO-{stage}: {rows[-1]['tokens_per_second']:,} tokens/s")
    return rows


def summary(preset: str, stage: int, overrides: list[str], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    batch = load_spec(preset, overrides).batch
    tokens_per_step = batch.global_batch_size * batch.sequence_length
    return {
        "preset": preset,
        "zero_stage": stage,
        "tokens_per_second": round(tokens_per_step / settled_median([line["step_seconds"] for line in metrics])),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in metrics),
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
    }


def largest_difference(losses: list[float], others: list[float]) -> float:
    return max(abs(loss - other) for loss, other in zip(losses, others, strict=True))


def table(rows: list[dict[str, Any]], card: str) -> Table:
    shown = Table("preset", "ZeRO", "tokens/s", "peak memory", "first loss", "last loss", "from stage 0", title=card)
    for row in rows:
        shown.add_row(
            row["preset"],
            str(row["zero_stage"]),
            f"{row['tokens_per_second']:,}",
            format_bytes(row["peak_memory_bytes"]),
            f"{row['first_loss']:.4f}",
            f"{row['last_loss']:.4f}",
            f"{row['largest_loss_difference_to_stage_0']:.4f}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
