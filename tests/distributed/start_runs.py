"""Runs that start from an existing model, for test_starts.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.distributed.attempts import attempt, on_rank_0
from tests.distributed.small_runs import GLOBAL_BATCH_SIZE, own_micro_batches, small_spec, warm_up

MODEL = "model={family: gpt2, num_layers: %d, hidden_size: 64, num_attention_heads: 4%s}"


def train_from_each(cases: list[dict[str, Any]], steps: int, measured: list[str]) -> dict[str, Any]:
    """On every rank, each case in turn, and then what `measure_and_spoil` tells."""
    return {"trained": [train_from(steps=steps, **case) for case in cases], "measured": measure_and_spoil(measured)}


def train_from(stage: int, overrides: list[str], steps: int) -> dict[str, Any]:
    """The losses of an engine whose weights are those of `model.init`, and the check of its weights."""
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import ranks
    from dsllm.engine.activity import Activity
    from dsllm.engine.gates.weights import check_weights
    from dsllm.engine.memory_meter import MemoryMeter
    from dsllm.engine.requests import Requests
    from dsllm.engine.start import start_engine
    from dsllm.engine.starting_point import open_starting_point
    from dsllm.engine.trainer import set_learning_rate, train_step

    world = ranks.join()
    size = GLOBAL_BATCH_SIZE // world.size
    spec = small_spec("gpt2", stage, *overrides, f"batch.micro_batch_size={size}")
    start = open_starting_point(spec, Activity())
    engine = start_engine(spec, build_ds_config(spec, world.size, "cpu"), start)
    check = check_weights(engine.module.causal_lm, start)
    micro_batches, losses = own_micro_batches(steps, world.rank, world.size, size), []
    for step in range(steps):
        set_learning_rate(engine, warm_up(step))
        metrics, _ = train_step(engine, micro_batches, Requests(), MemoryMeter(None), Activity())
        losses.append(metrics["loss"])
    engine.destroy()
    return {"losses": losses, "check": check.document()}


def measure_and_spoil(overrides: list[str]) -> dict[str, Any]:
    """At stage 3: number and bytes of the model's parameters; ticks, and what this rank held more than before, while
    they were set, at most, None where that is not measured; and what the check finds when a weight is not what was
    read."""
    import torch
    import torch.distributed as distributed

    from dsllm.ds_config import build_ds_config
    from dsllm.engine import ranks
    from dsllm.engine.activity import Activity
    from dsllm.engine.allocators import allocator
    from dsllm.engine.gates.weights import check_weights
    from dsllm.engine.starting_point import open_starting_point
    from dsllm.model.build import build_model, model_config
    from dsllm.model.gather import gathered

    world = ranks.join()
    spec = small_spec("gpt2", 3, *overrides)
    activity = Activity()
    start = open_starting_point(spec, activity)
    counter = allocator("cpu")
    before = counter.read().held_bytes if counter else 0
    if counter:
        counter.reset_peak()
    model = build_model(model_config(spec), torch.float32, build_ds_config(spec, world.size, "cpu"))
    start.set_weights(model)
    peak = counter.read().peak_bytes - before if counter else None
    parameter = model.get_parameter("transformer.h.1.mlp.c_fc.weight")
    with gathered(parameter, writer=1), torch.no_grad():
        if distributed.get_rank() == 1:
            parameter[0, 0] = torch.nan
    sizes = [4 * parameter.ds_numel for parameter in model.parameters()]
    told = {"parameters": len(sizes), "whole_bytes": sum(sizes), "peak_bytes": peak, "ticks": activity.ticks}
    return {**told, "check": check_weights(model, start).document()}


def tell(flags: list[str], folder: str) -> dict[str, Any]:
    """dsllm/train.py on every rank: a small model, deeper ones that start from it and from nothing, and what comes of
    them when the small one changes or goes."""
    from dsllm.checkpoint.export import export_run

    runs, out = Path(folder), Path(folder, "out")

    def run(name: str, layers: int, init: str = "", *settings: str) -> dict[str, Any]:
        arguments = [*flags, "--run-dir", str(runs / name), "--set", MODEL % (layers, init)]
        return attempt(arguments + [word for setting in settings for word in ("--set", setting)])

    init = f", init: {{kind: pretrained, name: '{out}'%s}}"
    grown = init % ", layers: '0-2,1-3'"
    longer = "training.train_steps=44"
    told = {"source": run("source", 4, "", "training.train_steps=80")}
    on_rank_0(lambda: export_run(runs / "source", out))
    told |= {
        "grown": run("grown", 6, grown, "guards.step_0_checks=true"),
        "scratch": run("scratch", 6),
        "shrunk": run("shrunk", 3, init % ", layers: '0-1,3'"),
    }
    told["wrong width"] = run("wide", 4, init % "", "model.hidden_size=128", "model.norm_epsilon=1e-6")
    on_rank_0(lambda: exchange_tokens(out / "tokenizer.json"))
    told["other tokenizer"] = run("other", 4, init % "")
    on_rank_0(lambda: [file.unlink() for file in out.glob("tokenizer*")])
    told["no tokenizer"] = run("none", 4, init % "", "training.train_steps=2")
    on_rank_0(lambda: shutil.rmtree(out))
    told["source gone"] = run("grown", 6, grown, longer)
    told["source moved"] = run("grown", 6, grown.replace("/out'", "/elsewhere'"), longer)
    told["other layers"] = run("grown", 6, grown.replace("0-2,1-3", "0-2,0-2"), longer)
    told["start from gone"] = run("fresh", 6, grown)
    return told


def exchange_tokens(file: Path) -> None:
    """Two tokens of a vocabulary have each other's numbers."""
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(document))
