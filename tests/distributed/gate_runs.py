"""The checks before the first step, on every rank, with and without a fault planted into what they check."""

from __future__ import annotations

import contextlib
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ATTEMPTS = runpy.run_path(str(Path(__file__).with_name("attempts.py")))


def check_each(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case in turn: the checks by name, and what was left of them."""
    from dsllm.engine import ranks

    world = ranks.join()
    return [check_case(world=world, **case) for case in cases]


def check_case(world: Any, overrides: list[str], fault: str | None = None) -> dict[str, Any]:
    """`quickstart` with `overrides`: its checks on a small model, and those of its own weights."""
    from dsllm.ds_config import build_ds_config
    from dsllm.engine.activity import Activity
    from dsllm.engine.allocators import allocator
    from dsllm.engine.gates.small_run import release_engines
    from dsllm.engine.gates.training import check_small_model
    from dsllm.engine.gates.weights import check_weights
    from dsllm.engine.requests import Requests
    from dsllm.engine.start import start_engine
    from dsllm.model.shapes import shape_of
    from dsllm.spec.load import load_spec

    spec, counter = load_spec("quickstart", overrides), allocator("cpu")
    release_engines()  # that of the case before
    held_bytes = counter.read().held_bytes if counter else 0
    random_state, linear = torch.get_rng_state(), torch.nn.functional.linear
    with planted(fault):
        checks = check_small_model(spec, world, Requests(), Activity())
        is_as_before = torch.equal(torch.get_rng_state(), random_state) and torch.nn.functional.linear is linear
        kept_bytes = counter.read().held_bytes - held_bytes if counter else 0
        engine = start_engine(spec, build_ds_config(spec, world.size, "cpu", shape=shape_of(spec)))
        checks.append(check_weights(engine.module.causal_lm))
    engine.destroy()
    torch.nn.functional.linear = linear  # zero.Init has replaced it
    documents = {check.name: check.document() for check in checks}
    return {"checks": documents, "is_as_before": is_as_before, "kept_bytes": kept_bytes}


def train_each(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """dsllm/train.py with the `arguments` of each, in turn, and its `fault` planted."""
    ends = []
    for run in runs:
        with planted(run.get("fault")):
            ends.append(ATTEMPTS["attempt"](run["arguments"]))
    return ends


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Within, something that a run relies on is wrong."""
    if fault is None:
        yield
        return
    with FAULTS[fault]():
        yield


def wide_weights() -> Any:
    """Every matrix has a deviation that is a tenth too large."""
    from dsllm.engine import start
    from dsllm.model.gather import gathered

    draw = start.initialize_weights

    def draw_too_wide(model: torch.nn.Module, seed: int) -> None:
        draw(model, seed)
        for parameter in model.parameters():
            with gathered(parameter, writer=0) as is_writer, torch.no_grad():
                if is_writer and parameter.ndim >= 2:
                    parameter.mul_(1.1)

    return mock.patch.object(start, "initialize_weights", draw_too_wide)


def labels_two_ahead() -> Any:
    """Labels that are shifted already are shifted once more, as transformers' own loss would."""
    from dsllm.model.loss import LossHead

    forward = LossHead.forward

    def forward_shifted(self: LossHead, hidden: Any, labels: torch.Tensor, loss_tokens: Any = None) -> torch.Tensor:
        return forward(self, hidden, labels.roll(-1, dims=1), loss_tokens)

    return mock.patch.object(LossHead, "forward", forward_shifted)


def undivided_accumulation() -> Any:
    """Gradients of micro-batches are added up, and not divided by their number."""
    return _backward(lambda engine, backward, loss: backward(engine, loss, scale_wrt_gas=False))


def lost_rank() -> Any:
    """At the stage that the spec chose, 2, the gradients of the last rank are 0."""

    def lose(engine: Any, backward: Callable[..., Any], loss: torch.Tensor) -> Any:
        is_lost = engine.zero_optimization_stage() == 2 and engine.global_rank == engine.world_size - 1
        return backward(engine, loss * 0.0 if is_lost else loss)

    return _backward(lose)


def _backward(changed: Callable[..., Any]) -> Any:
    from deepspeed import DeepSpeedEngine

    backward = DeepSpeedEngine.backward
    return mock.patch.object(DeepSpeedEngine, "backward", lambda engine, loss: changed(engine, backward, loss))


FAULTS: dict[str, Callable[[], Any]] = {
    "wide weights": wide_weights,
    "labels two ahead": labels_two_ahead,
    "undivided accumulation": undivided_accumulation,
    "lost rank": lost_rank,
}
