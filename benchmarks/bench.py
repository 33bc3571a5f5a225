"""dsllm's tokens per second against a bare DeepSpeed loop, the Hugging Face Trainer, and itself at ZeRO-0.

All train the same shapes with the same DeepSpeed JSON on CPU ranks. The contenders take turns, several rounds of them,
and a ratio is the median over the rounds: what slows the machine for a while slows all of a round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from measure import describe_machine, settled_median, start_ranks, steps_argument, train, write_results
from rich.console import Console
from rich.table import Table

from dsllm.ds_config import build_ds_config
from dsllm.errors import DsllmError
from dsllm.model.build import model_config
from dsllm.spec.load import load_spec

SPEC = "quickstart"
NUM_RANKS = 2
DSLLM = "dsllm, ZeRO-1"
BARE = "bare DeepSpeed loop, ZeRO-1"
TRAINER = "Hugging Face Trainer, ZeRO-1"
STAGE_0 = "dsllm, ZeRO-0"
STAGE_0_BF16 = "dsllm, ZeRO-0, bf16"
STAGE_1_BF16 = "dsllm, ZeRO-1, bf16"
# Few CPUs multiply in bf16 at any speed: with shorter steps the optimizer, in which the stages differ, still counts.
HALF_PRECISION = {"fp32": [], "bf16": ["batch={sequence_length: 64, global_batch_size: 4, micro_batch_size: 2}"]}
# What is compared with what, and the least ratio that is good enough.
RATIOS = ((DSLLM, BARE, 0.97), (DSLLM, TRAINER, 1.0), (STAGE_0, DSLLM, 1.0), (STAGE_0_BF16, STAGE_1_BF16, 1.0))

Contender = Callable[[Path], float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=steps_argument, default=24, help="optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contender gets")
    args = parser.parse_args()
    console = Console()
    if shutil.which("c++") is None:
        console.print("bench: a bare DeepSpeed loop on the CPU compiles C++ at its start; install g++", style="red")
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            rounds = measure_rounds(Path(folder), args.steps, args.rounds, console)
    except DsllmError as error:
        console.print(str(error), markup=False, highlight=False)
        return error.exit_code
    ratios = median_ratios(rounds)
    show(console, rounds, ratios)
    settings = {"spec": SPEC, "num_ranks": NUM_RANKS, "steps": args.steps}
    path = write_results(
        "throughput-cpu.json",
        {"machine": describe_machine(), **settings, "tokens_per_second": rounds, "ratios": ratios},
    )
    console.print(f"Written to {path}")
    return 0


def measure_rounds(folder: Path, steps: int, num_rounds: int, console: Console) -> list[dict[str, float]]:
    """Tokens per second of every contender, a mapping for each round."""
    contenders = prepare(folder, steps)
    rounds = []
    for number in range(num_rounds):
        speeds = {}
        for name, tokens_per_second in contenders.items():
            with console.status(f"round {number + 1} of {num_rounds}: {name}"):
                speeds[name] = tokens_per_second(folder / f"{number}-{len(speeds)}")
            console.print(f"round {number + 1} of {num_rounds}: {name}: {speeds[name]:,.0f} tokens/s")
        rounds.append(speeds)
    return rounds


def prepare(folder: Path, steps: int) -> dict[str, Contender]:
    """How each contender is run: from a path for its outputs to its tokens per second."""
    overrides = [
        f"training.train_steps={steps}",
        f"schedule.warmup_steps={steps // 4}",
        f"checkpoint.interval={steps}",
        f"evaluation.interval={steps}",
        f"data.directory={folder / 'data'}",
    ]
    stage_1 = load_spec(SPEC, [*overrides, "zero.stage=1"])
    (folder / "ds_config.json").write_text(json.dumps(build_ds_config(stage_1, NUM_RANKS, "cpu")))
    model_config(stage_1).save_pretrained(folder / "model")
    rival = ["--model", folder / "model", "--ds-config", folder / "ds_config.json", "--steps", steps]
    rival += ["--sequence-length", stage_1.batch.sequence_length]

    def dsllm_at(stage: int, precision: str = "fp32") -> Contender:
        settings = [*overrides, *HALF_PRECISION[precision], f"zero.stage={stage}", f"training.precision={precision}"]
        return lambda path: settled_median(
            [line["tokens_per_second"] for line in train(SPEC, settings, path, NUM_RANKS, "cpu")]
        )

    def rival_in(script: str) -> Contender:
        return lambda path: stage_1.tokens_per_step / rival_seconds(script, [str(part) for part in rival], path)

    contenders = {
        DSLLM: dsllm_at(1),
        BARE: rival_in("benchmarks/bare_deepspeed.py"),
        TRAINER: rival_in("benchmarks/hf_trainer.py"),
        STAGE_0: dsllm_at(0),
        STAGE_0_BF16: dsllm_at(0, "bf16"),
        STAGE_1_BF16: dsllm_at(1, "bf16"),
    }
    return contenders


def rival_seconds(script: str, arguments: list[str], path: Path) -> float:
    output = path.with_suffix(".json")
    start_ranks(script, [*arguments, "--output", str(output)], NUM_RANKS, path.with_suffix(".log"), "cpu")
    return settled_median(json.loads(output.read_text()))


def median_ratios(rounds: list[dict[str, float]]) -> dict[str, float]:
    """For each pair of RATIOS the median over the rounds."""
    return {f"{ours} / {other}": statistics.median(r[ours] / r[other] for r in rounds) for ours, other, _ in RATIOS}


def show(console: Console, rounds: list[dict[str, float]], ratios: dict[str, float]) -> None:
    speeds = Table("contender", "tokens/s, median", "of rounds", title=f"{SPEC} on {NUM_RANKS} CPU ranks")
    for name in rounds[0]:
        each = [speeds_of_round[name] for speeds_of_round in rounds]
        speeds.add_row(name, f"{statistics.median(each):,.0f}", "  ".join(f"{speed:,.0f}" for speed in each))
    console.print(speeds)
    comparison = Table("ratio", "median of rounds", "wanted", "")
    for (name, ratio), (*_, wanted) in zip(ratios.items(), RATIOS, strict=True):
        comparison.add_row(name, f"{ratio:.3f}", f">= {wanted:.2f}", "ok" if ratio >= wanted else "missed")
    console.print(comparison)


if __name__ == "__main__":
    sys.exit(main())
