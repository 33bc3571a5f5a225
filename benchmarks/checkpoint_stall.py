"""How long training waits for a checkpoint that is written beside it, against DeepSpeed's own save of the same state.

python benchmarks/checkpoint_stall.py

Both save the same engine, in turns. What training waits for is the copy to host memory and, later, the word that every
rank has written; the disk is flushed and the files are read back meanwhile, neither of which DeepSpeed does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import describe_machine, start_ranks, write_results
from rich.console import Console
from rich.table import Table

from dsllm.errors import DsllmError
from dsllm.units import MIB

BOUND = 0.25
SHAPE = [
    "model={family: gpt2, num_layers: 12, hidden_size: 768, num_attention_heads: 12, max_position_embeddings: 64}",
    "tokenizer={kind: bpe, vocab_size: 16384}",
    "batch={sequence_length: 64, global_batch_size: 2, micro_batch_size: 1}",
]
CASES = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folder", type=Path, help="a folder on the disk that is to be measured")
    args = parser.parse_args()
    console = Console()
    cases = [
        {
            "spec": "quickstart",
            "overrides": [
                *SHAPE,
                f"training={{train_steps: 1000, precision: {precision}}}",
                f"zero={{stage: {stage}}}",
            ],
        }
        for stage, precision in CASES
    ]
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows = measure(Path(folder), cases, args.rounds, args.ranks, args.accelerator)
    except DsllmError as error:
        console.print(str(error), markup=False, highlight=False)
        return error.exit_code
    show(console, rows)
    settings = {"machine": describe_machine(), "ranks": args.ranks, "rounds": args.rounds}
    path = write_results(f"checkpoint-stall-{args.accelerator}.json", {**settings, "saves": rows})
    console.print(f"written to {path}")
    return 0


def measure(folder: Path, cases: list[dict[str, Any]], rounds: int, ranks: int, accelerator: str) -> list[dict]:
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = ["--cases", folder / "cases.json", "--output", folder / "rows.json", "--folder", folder]
    arguments += ["--rounds", rounds]
    start_ranks("benchmarks/stall_ranks.py", [str(word) for word in arguments], ranks, folder / "log", accelerator)
    return json.loads((folder / "rows.json").read_text())


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"one checkpoint; good is at most {BOUND:.0%} of DeepSpeed's time, and no more bytes")
    for column in ("state", "MiB", "DeepSpeed MiB", "DeepSpeed s", "waited s", "ratio", "step s", "while writing s"):
        table.add_column(column, justify="left" if column == "state" else "right")
    for row in rows:
        ratio = row["waited_seconds"] / row["deepspeed_seconds"]
        style = "green" if ratio <= BOUND and row["bytes"] <= row["deepspeed_bytes"] else "red"
        table.add_row(
            f"ZeRO-{row['stage']}, {row['precision']}",
            f"{row['bytes'] / MIB:.2f}",
            f"{row['deepspeed_bytes'] / MIB:.2f}",
            f"{row['deepspeed_seconds']:.3f}",
            f"{row['waited_seconds']:.3f}",
            f"[{style}]{ratio:.0%}[/{style}]",
            f"{row['step_seconds']:.3f}",
            f"{row['step_while_writing_seconds']:.3f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
