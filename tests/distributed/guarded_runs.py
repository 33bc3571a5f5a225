"""Small runs whose numbers go wrong on one rank, for tests/distributed/test_numbers.py."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as distributed

from tests.distributed.attempts import attempt
from tests.distributed.small_runs import (
    GLOBAL_BATCH_SIZE,
    own_micro_batches,
    small_spec,
    warm_up,
    weights_digest,
)

FAULTY_RANK = 1
FAULTS = {2: "gradient", 3: "loss", 5: "gradient once"}
"""What goes wrong in a step of the small runs, counted from 0."""
STEPS = 6
ACCUMULATION = 2
SPIKE_STEP, SAVED_STEP, TRAIN_STEPS = 11, 8, 15
"""Of the runs through dsllm/train.py, counted from 1; they save every four steps."""


def tell(flags: list[str], stages: list[int], folder: str) -> dict[str, Any]:
    """Runs of dsllm/train.py with a spoiled batch, on every rank: how each ended, and what its forwards read."""

    told = {f"spiked {stage}": _meet_a_spike(_at_stage(flags, stage), f"{folder}/spiked-{stage}") for stage in stages}
    return {
        **told,
        "warned": _train_spoiled([*flags, "--run-dir", f"{folder}/warned", "--set", "guards.on_spike=warn"], 1),
        "too often": _train_spoiled(
            [*flags, "--run-dir", f"{folder}/too-often", "--set", "guards.max_roll_backs=1"], 2
        ),
        "nothing saved": _train_spoiled(
            [*flags, "--run-dir", f"{folder}/nothing-saved", "--set", "checkpoint.interval=1000"], 1
        ),
        "not finite": _train_spoiled([*flags, "--run-dir", f"{folder}/not-finite"], math.inf, by=math.nan),
    }


def _at_stage(flags: list[str], stage: int) -> list[str]:
    return [*flags, "--set", f"zero.stage={stage}"]


def _meet_a_spike(flags: list[str], run: str) -> dict[str, Any]:
    """The run that is rolled back; one without a spike; one that goes on from the first's checkpoint before the
    spike, in a folder of its own."""
    rolled_back = _train_spoiled([*flags, "--run-dir", run], 1)
    undisturbed = _train_spoiled([*flags, "--run-dir", f"{run}-undisturbed"], 0)
    resumed = _train_spoiled(
        [*flags, "--run-dir", f"{run}-resumed", "--resume", f"{run}/checkpoints/global_step{SAVED_STEP}"], 0
    )
    return {"rolled back": rolled_back, "undisturbed": undisturbed, "resumed": resumed}


def _train_spoiled(arguments: list[str], num_batches: float, by: float = 3.0) -> dict[str, Any]:
    """dsllm/train.py; from the spike's step on, the loss of so many batches is multiplied on the faulty rank."""
    from dsllm.engine import start

    spoiler = Spoiler(num_batches, by)
    usual_start = start.start_engine
    start.start_engine = lambda *given: spoiler.attach(usual_start(*given))
    try:
        return {**attempt(arguments), "read": spoiler.read}
    finally:
        start.start_engine = usual_start


class Spoiler:
    """Multiplies the loss of this rank's share of some batches, whenever they come, and notes what forwards read."""

    def __init__(self, num_batches: float, by: float) -> None:
        self.read: list[str] = []
        self._num_batches = num_batches
        self._by = by
        self._spoiled: set[str] = set()

    def attach(self, engine: Any) -> Any:
        """Look at the forwards of `engine`."""
        engine.module.register_forward_hook(self._on_forward, with_kwargs=True)
        return engine

    def _on_forward(self, module: torch.nn.Module, inputs: Any, batch: dict[str, Any], loss: torch.Tensor) -> Any:
        if not module.training:
            return loss
        digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()[:12]
        self.read.append(digest)
        is_due = len(self.read) > (SPIKE_STEP - 1) * ACCUMULATION and distributed.get_rank() == FAULTY_RANK
        if is_due and len(self._spoiled) < self._num_batches * ACCUMULATION:
            self._spoiled.add(digest)
        return loss * self._by if digest in self._spoiled else loss


def run_faulty_cases(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On every rank, each case in turn."""
    return [run_faulty_case(**case) for case in cases]


def run_faulty_case(stage: int, precision: str, overrides: list[str]) -> dict[str, Any]:
    """A run of which some steps are not finite on one rank, and one that never had the samples of those skipped."""
    spec_of = functools.partial(small_spec, "gpt2", stage, f"training.precision={precision}", *overrides)
    spared_steps = [step for step in range(STEPS) if FAULTS.get(step) not in ("gradient", "loss")]
    return {"faulty": _train(spec_of, range(STEPS), FAULTS), "spared": _train(spec_of, spared_steps, {})}


def _train(spec_of: Callable[..., Any], steps: Iterable[int], faults: Mapping[int, str]) -> dict[str, Any]:
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import ranks
    from dsllm.engine.activity import Activity
    from dsllm.engine.memory_meter import MemoryMeter
    from dsllm.engine.requests import Requests
    from dsllm.engine.start import start_engine
    from dsllm.engine.trainer import set_learning_rate, train_step

    world = ranks.join()
    size = GLOBAL_BATCH_SIZE // (world.size * ACCUMULATION)
    spec = spec_of(f"batch.micro_batch_size={size}")
    engine = start_engine(spec, build_ds_config(spec, world.size, "cpu"))
    every_micro_batch = list(own_micro_batches(STEPS, world.rank, world.size, size))
    injector, requests, memory, activity = Injector(engine.module), Requests(), MemoryMeter(None), Activity()
    told: dict[str, list[Any]] = {"losses": [], "faults": [], "digests": [], "global_steps": []}
    for step in steps:
        injector.kind = faults.get(step) if world.rank == FAULTY_RANK else None
        set_learning_rate(engine, warm_up(step))
        own = iter(every_micro_batch[step * ACCUMULATION : (step + 1) * ACCUMULATION])
        metrics, fault = train_step(engine, own, requests, memory, activity)
        told["losses"].append(metrics["loss"])
        told["faults"].append(fault and asdict(fault))
        told["digests"].append(weights_digest(engine.module))
        told["global_steps"].append(engine.global_steps)
    engine.destroy()
    return told


class Injector:
    """Spoils the gradient of one parameter, or the loss, as `kind` says; None leaves both alone."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.kind: str | None = None
        next(p for name, p in module.named_parameters() if "h.1.mlp.c_fc.weight" in name).register_hook(self._gradient)
        module.register_forward_hook(self._loss)

    def _gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.kind == "gradient once":
            self.kind = None
        elif self.kind != "gradient":
            return gradient
        return gradient + torch.nan

    def _loss(self, module: torch.nn.Module, inputs: Any, loss: torch.Tensor) -> torch.Tensor:
        # its gradients are finite, as those of a target to which the model gives no probability
        return loss + torch.inf if self.kind == "loss" else loss
