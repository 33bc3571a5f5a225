"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from deepspeed import DeepSpeedEngine

from dsllm.data.loader import MicroBatch
from dsllm.engine import guards, ranks
from dsllm.engine.activity import Activity
from dsllm.engine.memory_meter import MemoryMeter
from dsllm.engine.requests import Requests

Record = dict[str, Any]


class Saver(Protocol):
    """Writes checkpoints while training goes on: dsllm.checkpoint.save.CheckpointSaver."""

    def save(self, step: int, *, must_succeed: bool = False) -> None: ...
    def settle(self) -> None: ...
    def poll(self) -> None: ...


def train(
    engine: DeepSpeedEngine,
    micro_batches: Iterator[MicroBatch],
    *,
    first_step: int,
    train_steps: int,
    evaluation_interval: int,
    checkpoint_interval: int,
    learning_rate: Callable[[int], float],
    evaluate: Callable[[], Record],
    saver: Saver,
    record: Callable[[Record], None],
    check: Callable[[int, float], None],
    requests: Requests,
    memory: MemoryMeter,
    activity: Activity,
) -> int:
    """Run the steps from `first_step` to `train_steps`, or until asked to stop; the state is saved when this returns.

    A step is counted from 0 while it runs and from 1 once it is done. Returns the steps done in all.
    """
    done = first_step
    for step in range(first_step, train_steps):
        activity.begin_step(step + 1)
        rate = learning_rate(step)
        set_learning_rate(engine, rate)
        skipped = engine.skipped_steps
        metrics = train_step(engine, micro_batches, requests, memory, activity, before_update=saver.settle)
        done = step + 1
        check(done, metrics["loss"])
        guards.check_gradients(done, metrics["grad_norm"], engine.skipped_steps > skipped)
        if done == 1 or done == train_steps or done % evaluation_interval == 0:
            metrics |= evaluate()
        record({"step": done, "lr": rate, **metrics})
        is_last = done == train_steps or requests.stop
        if is_last or requests.save or done % checkpoint_interval == 0:
            activity("saving")
            saver.save(done, must_succeed=is_last)
        else:
            saver.poll()
        if requests.stop:
            break
    return done


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: Iterator[MicroBatch],
    requests: Requests,
    memory: MemoryMeter,
    activity: Activity,
    before_update: Callable[[], None] = lambda: None,
) -> Record:
    """One optimizer update: forward and backward for each micro-batch; DeepSpeed accumulates, reduces, clips, steps.

    Returns the mean loss over all ranks' counted tokens, the gradients' norm before clipping, and the seconds taken.
    """
    started = time.perf_counter()
    device = ranks.device()
    total_loss = torch.zeros((), device=device)
    micro_steps = engine.gradient_accumulation_steps()
    for _ in range(micro_steps):
        activity("reading")
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(micro_batches).items()}
        activity("forward")
        with memory.phase("forward"):
            loss = engine(**batch)
        activity("backward")
        with memory.phase("backward"):
            engine.backward(loss)
        total_loss += loss.detach()
        norm = unscaled_gradient_norm(engine)
        activity("step")
        before_update()
        with memory.phase("step"):
            engine.step()
    asked = torch.tensor(requests.own(), device=device)
    loss, *agreed = ranks.mean_over_ranks(torch.cat([total_loss[None] / micro_steps, asked])).tolist()
    requests.agree(*agreed)
    grad_norm = float(engine.get_global_grad_norm() if norm is None else norm)
    return {"loss": loss, "grad_norm": grad_norm, "step_seconds": time.perf_counter() - started}


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    """The learning rate of the next optimizer update, in every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def unscaled_gradient_norm(engine: DeepSpeedEngine) -> torch.Tensor | None:
    """Norm of the reduced gradients where DeepSpeed keeps none: fp32 at stage 0, before its step clips them."""
    if not (engine.is_gradient_accumulation_boundary() and isinstance(engine.optimizer, torch.optim.Optimizer)):
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
