"""Tokens per second, model FLOPs utilisation and peak memory of the real engine, with everything on and with each
setting off in turn, beside the Hugging Face Trainer on DeepSpeed.

Every case is a process of its own, so that one that runs out of memory ends its row alone. Tokens are random and the
models keep their own shapes, so that no network is needed. `--profile` shows where time goes by kernel.

    python benchmarks/throughput.py --preset gpt2-124m --profile
    python benchmarks/throughput.py --preset quickstart --device cpu --steps 7      # the script itself, anywhere
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import RESULTS, describe_machine, settled_median, start_ranks, steps_argument, write_results
from rich.console import Console
from rich.table import Table

from dsllm.ds_config import build_ds_config
from dsllm.errors import DsllmError, UserError
from dsllm.launch.devices import local_gpus
from dsllm.model.build import model_config
from dsllm.plan.hardware import gpu_of_device
from dsllm.plan.model_shape import flops_per_token, model_shape
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec
from dsllm.units import format_bytes

ACCUMULATION = 4
"""Micro-batches of a step: the optimizer's part of it is then near that of a real run."""
LEAST_SECONDS = 30.0
"""A case is not begun where less is left of the time limit."""

LOGS = RESULTS / "logs"
"""All that the ranks of each case printed, the last time that it ran."""
FAULT = re.compile(r"(Error|Exception)(:|$)|out of memory", re.MULTILINE)

NO_NETWORK = ["data.sources=[{kind: python-stdlib}]", "logging.wandb=null"]
PRESETS = {
    # what fits beside the states of one card of 80 GB, without computing anything twice
    "gpt2-124m": (32, ["model.vocab_size=50257"]),
    "1b": (8, ["model.vocab_size=50257", "training.activation_checkpointing=none"]),
    "llama-1b": (4, ["training.activation_checkpointing=none"]),
    "quickstart": (2, []),
}
"""Micro-batch and overrides of each."""

ON = ["training.compile=true", "training.loss=auto", "training.kernels=auto", "training.tf32=true"]
ALL_ON = "everything on"
TRAINER = "Hugging Face Trainer"
CASES: dict[str, list[str]] = {
    ALL_ON: [],
    "blocks not compiled": ["training.compile=false"],
    "nor liger's kernels": ["training.compile=false", "training.kernels=torch"],
    "loss in chunks": ["training.loss=chunked"],
    "loss plain": ["training.loss=plain"],
    "AdamW not fused": ["optimizer.fused=false"],
    "no TF32": ["training.tf32=false"],
    "Muon": ["optimizer.name=muon"],
    TRAINER: [],
}
"""Overrides on top of ON, by what they switch off."""


def main() -> int:
    args = parse_arguments()
    console = Console()
    try:
        num_ranks = args.num_ranks or (len(local_gpus()) if args.device == "cuda" else 1)
        if num_ranks == 0:
            raise UserError("throughput: no CUDA GPU here; run it where there is one, or with --device cpu")
        with tempfile.TemporaryDirectory() as folder:
            rows = list(measure_all(args, num_ranks, Path(folder), console))
    except DsllmError as error:
        console.print(str(error), markup=False, highlight=False, style="red")
        return error.exit_code
    card = next((row["device_name"] for row in rows if "device_name" in row), args.device)
    show(console, rows, card, num_ranks)
    if args.device == "cuda":  # on a CPU the script itself is tried, and bench.py measures
        settings = {"steps": args.steps, "num_ranks": num_ranks, "accumulation": ACCUMULATION, "overrides": args.set}
        name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        results = {"card": card, "machine": describe_machine(), **settings, "runs": rows}
        console.print(f"Written to {write_results(f'throughput-{name}.json', results)}")
    return 0 if any("tokens_per_second" in row for row in rows) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, action="append", help="only this one; may be repeated")
    parser.add_argument("--case", choices=CASES, action="append", help="only this one; may be repeated")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--num-ranks", type=int, help="all GPUs of this machine when absent; one on a CPU")
    parser.add_argument("--micro-batch-size", type=int, help="sequences a rank, for every preset")
    parser.add_argument("--steps", type=steps_argument, default=12, help="optimizer steps of each case")
    parser.add_argument("--time-limit", type=float, default=3600.0, help="seconds, after which no case is begun")
    parser.add_argument("--profile", action="store_true", help="where time goes by kernel, with everything on")
    parser.add_argument("--set", action="append", default=[], help="section.key=value, added to every case")
    args = parser.parse_args()
    args.preset = args.preset or [preset for preset in PRESETS if preset != "quickstart"]
    args.case = args.case or list(CASES)
    if args.profile and ALL_ON not in args.case:
        parser.error(f"--profile is of the case '{ALL_ON}', which --case leaves out; add --case '{ALL_ON}'")
    return args


def measure_all(args: argparse.Namespace, num_ranks: int, folder: Path, console: Console) -> Iterator[dict[str, Any]]:
    """A row for each case of each preset, told as it is found."""
    end = time.monotonic() + args.time_limit
    for preset in args.preset:
        for case in args.case:
            row = {"preset": preset, "case": case}
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                row["failure"] = "not begun: the time limit"
            else:
                with console.status(f"{preset}, {case}"):
                    row |= measure_case(preset, case, args, num_ranks, folder / file_name(preset, case), left)
            console.print(f"{preset}, {case}: {summary(row)}", markup=False, highlight=False)
            yield row


def file_name(preset: str, case: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{preset} {case}".lower())


def measure_case(
    preset: str, case: str, args: argparse.Namespace, num_ranks: int, path: Path, seconds: float
) -> dict[str, Any]:
    """What one case came to; its failure in a line where it failed."""
    overrides = overrides_of(preset, case, args, num_ranks)
    spec, output, log = load_spec(preset, overrides), path.with_suffix(".json"), LOGS / f"{path.name}.log"
    LOGS.mkdir(parents=True, exist_ok=True)
    try:
        if case == TRAINER:
            script, arguments = "benchmarks/hf_trainer.py", trainer_arguments(spec, args, num_ranks, path)
        else:
            script = "benchmarks/throughput_ranks.py"
            arguments = ["--spec", preset, "--steps", str(args.steps)]
            arguments += [part for override in overrides for part in ("--set", override)]
            arguments += ["--profile"] if args.profile and case == ALL_ON else []
        start_ranks(script, [*arguments, "--output", str(output)], num_ranks, log, args.device, seconds)
    except DsllmError as error:
        return {"failure": reason(error, log)}
    found = json.loads(output.read_text())
    found = {"step_seconds": found} if isinstance(found, list) else found
    return {**rates(spec, found.pop("step_seconds"), args.device, num_ranks), **found}


def reason(error: DsllmError, log: Path) -> str:
    """Why a case failed, in a line: the last error in its log that is a rank's, since the launcher's own words come
    after it and say only that a rank ended."""
    first, *more = str(error).splitlines()
    if not more:  # stopped from here, so that the log says nothing of it
        return first
    lines = log.read_text(errors="replace").splitlines()
    faults = [line.strip() for line in lines if FAULT.search(line) and "launch.py" not in line]
    return faults[-1][:200] if faults else f"{first} {log}"


def overrides_of(preset: str, case: str, args: argparse.Namespace, num_ranks: int) -> list[str]:
    size, own = PRESETS[preset]
    size = args.micro_batch_size or size
    batch = [f"batch.micro_batch_size={size}", f"batch.global_batch_size={size * ACCUMULATION * num_ranks}"]
    return [*NO_NETWORK, *own, *batch, *ON, *CASES[case], *args.set]


def trainer_arguments(spec: Spec, args: argparse.Namespace, num_ranks: int, path: Path) -> list[str]:
    """The Trainer's own loss and model, on dsllm's JSON, shapes and steps; with AdamW, the only one in a JSON."""
    ds_config, model = path.with_suffix(".ds.json"), path.with_suffix(".model")
    with_adamw = spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update={"name": "adamw"})})
    ds_config.write_text(json.dumps(build_ds_config(with_adamw, num_ranks, args.device)))
    model_config(spec).save_pretrained(model)
    sizes = ["--sequence-length", str(spec.batch.sequence_length), "--steps", str(args.steps)]
    recomputes = ["--gradient-checkpointing"] if spec.training.activation_checkpointing == "full" else []
    return ["--model", str(model), "--ds-config", str(ds_config), *sizes, *recomputes]


def rates(spec: Spec, step_seconds: list[float], device: str, num_ranks: int) -> dict[str, Any]:
    """Tokens per second of all ranks, and of that the share of the peak where it is known."""
    rate = spec.tokens_per_step / settled_median(step_seconds)
    peak = peak_flops(device)
    flops = flops_per_token(model_shape(spec), spec.batch.sequence_length)
    utilisation = {"mfu": rate * flops / (peak * num_ranks), "peak_flops": peak} if peak else {}
    return {"tokens_per_second": round(rate), **utilisation}


def peak_flops(device: str) -> float | None:
    """Of one card, dense, in 16 bits; None where the catalogue does not have it."""
    if device == "cpu":
        return None
    gpu = gpu_of_device(local_gpus()[0].name)  # torch would open a context here, and hold its memory beside the ranks'
    return gpu.peak_flops if gpu else None


def summary(row: dict[str, Any]) -> str:
    if "failure" in row:
        return row["failure"]
    parts = [f"{row['tokens_per_second']:,} tokens/s"]
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%} of {row['peak_flops'] / 1e12:,.0f} TFLOP/s")
    if "peak_bytes" in row:
        parts.append(f"{format_bytes(row['peak_bytes'])} ({error_of(row)} predicted)")
    return ", ".join(parts)


def error_of(row: dict[str, Any]) -> str:
    return f"{row['predicted_bytes'] / row['peak_bytes'] - 1:+.1%}"


def show(console: Console, rows: list[dict[str, Any]], card: str, num_ranks: int) -> None:
    """The table, and where there is a profile the shares of a step."""
    shown = Table(
        "preset", "case", "tokens/s", "of all on", "MFU", "peak memory", "predicted", title=f"{num_ranks} x {card}"
    )
    on = {row["preset"]: row.get("tokens_per_second") for row in rows if row["case"] == ALL_ON}
    for row in rows:
        rate, base = row.get("tokens_per_second"), on.get(row["preset"])
        shown.add_row(
            row["preset"],
            row["case"],
            f"{rate:,}" if rate else row["failure"],
            f"{rate / base:.3f}" if rate and base else "",
            f"{row['mfu']:.1%}" if "mfu" in row else "",
            format_bytes(row["peak_bytes"]) if "peak_bytes" in row else "",
            error_of(row) if "peak_bytes" in row else "",
        )
    console.print(shown)
    for row in (row for row in rows if row["case"] == TRAINER):
        if on.get(row["preset"]) and row.get("tokens_per_second"):
            ratio = on[row["preset"]] / row["tokens_per_second"]
            console.print(f"{row['preset']}: {ratio:.2f} times the {TRAINER}", highlight=False)
    for row in (row for row in rows if "kernel_seconds" in row):
        total = sum(row["kernel_seconds"].values())
        shares = ", ".join(f"{group} {seconds / total:.1%}" for group, seconds in row["kernel_seconds"].items())
        console.print(f"{row['preset']}, a step of {total:.3f} s by kernel: {shares}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
