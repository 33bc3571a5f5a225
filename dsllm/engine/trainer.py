"""The training loop."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from deepspeed import DeepSpeedEngine

from dsllm.data.loader import MicroBatch
from dsllm.engine import nonfinite, ranks
from dsllm.engine.activity import Activity
from dsllm.engine.generators import generator_states, set_generator_states
from dsllm.engine.judge import Judge
from dsllm.engine.memory_meter import MemoryMeter
from dsllm.engine.optimizer import SkippingAdamW
from dsllm.engine.requests import Requests

Record = dict[str, Any]


class Question(NamedTuple):
    """What the model is asked at intervals: its validation loss, for one."""

    interval: int
    """In steps; the last step is always asked."""
    ask: Callable[[], Record]
    """What the step's record says of it; collective."""
    at_first: bool = False
    """Whether the first step is asked too."""

    def is_due(self, step: int) -> bool:
        return step % self.interval == 0 or (self.at_first and step == 1)


class Saver(Protocol):
    """Writes checkpoints while training goes on: dsllm.checkpoint.save.CheckpointSaver."""

    has_saved: bool

    def save(self, step: int, *, must_succeed: bool = False) -> None: ...
    def settle(self) -> None: ...
    def poll(self) -> None: ...


def train(
    engine: DeepSpeedEngine,
    read: Callable[[int], Generator[MicroBatch, None, None]],
    *,
    first_step: int,
    train_steps: int,
    questions: Sequence[Question],
    checkpoint_interval: int,
    learning_rate: Callable[[int], float],
    saver: Saver,
    record: Callable[[Record], None],
    judge: Judge,
    roll_back: Callable[[], int],
    requests: Requests,
    memory: MemoryMeter,
    activity: Activity,
) -> int:
    """Run the steps from `first_step` to `train_steps`, or until asked to stop; the state is saved when this returns.

    `read` opens the micro-batches from a step on. `roll_back` puts the engine and the records back to the last
    checkpoint, on every rank together, and returns the steps that are done there. A step is counted from 0 while it
    runs and from 1 once it is done. Returns the steps done in all.
    """
    done, micro_batches, is_due = first_step, read(first_step), False
    while done < train_steps:
        activity.begin_step(done + 1)
        rate = learning_rate(done)
        set_learning_rate(engine, rate)
        metrics, fault = train_step(engine, micro_batches, requests, memory, activity, before_update=saver.settle)
        done += 1
        can_go_back = saver.has_saved or first_step > 0
        if judge.goes_back(done, metrics["loss"], metrics["grad_norm"], fault, can_go_back):
            micro_batches.close()
            spike, done = done, roll_back()
            judge.rolled_back(spike, done)
            micro_batches = read(done)
            if requests.stop:
                break
            continue
        for question in questions:
            if done == train_steps or (not requests.stop and question.is_due(done)):
                metrics |= question.ask()
        record({"step": done, "lr": rate, **metrics})
        is_last = done == train_steps or requests.stop
        is_due = requests.take_save() or is_due or done % checkpoint_interval == 0
        if is_last or (is_due and judge.is_sound):
            activity("saving")
            saver.save(done, must_succeed=is_last)
            is_due = False
        else:
            saver.poll()
        if requests.stop:
            break
    micro_batches.close()
    return done


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: Iterator[MicroBatch],
    requests: Requests,
    memory: MemoryMeter,
    activity: Activity,
    before_update: Callable[[], None] = lambda: None,
) -> tuple[Record, nonfinite.Fault | None]:
    """One optimizer update; where it is skipped because it is not finite, once more, to find whose numbers are not.

    Returns the mean loss over all ranks' counted tokens, that which keeps experts balanced where there are any, the
    gradients' norm before clipping, and the seconds taken; and the fault, if there was one.
    """
    started = time.perf_counter()
    states, scale_can_fall = generator_states(), nonfinite.loss_scale_can_fall(engine)
    # `kept` holds on to the micro-batches, on the host, for a second computation
    batches, kept = itertools.tee(itertools.islice(micro_batches, engine.gradient_accumulation_steps()))
    compute = functools.partial(
        _update, engine, requests=requests, memory=memory, activity=activity, before_update=before_update
    )
    update, fault = compute(batches), None
    if update.was_skipped and not (scale_can_fall and math.isfinite(update.loss)):
        set_generator_states(states)
        uncount_step(engine)
        with nonfinite.own_gradients_watched(engine.module) as own_gradients:
            update = compute(kept)
        fault = nonfinite.located("skipped" if update.was_skipped else "recovered", update.own_loss, own_gradients)
    elif not (update.was_skipped or math.isfinite(update.loss + update.grad_norm)):
        fault = nonfinite.located("spoiled", update.own_loss, ())
    losses = {"loss": update.loss, **({} if update.balance_loss is None else {"balance_loss": update.balance_loss})}
    return {**losses, "grad_norm": update.grad_norm, "step_seconds": time.perf_counter() - started}, fault


class Update(NamedTuple):
    """What came of the micro-batches of a step."""

    loss: float
    """Mean over all ranks."""
    balance_loss: float | None
    """The same, of a model with experts."""
    own_loss: float
    grad_norm: float
    was_skipped: bool


def _update(
    engine: DeepSpeedEngine,
    batches: Iterator[MicroBatch],
    requests: Requests,
    memory: MemoryMeter,
    activity: Activity,
    before_update: Callable[[], None],
) -> Update:
    """Forward and backward for each micro-batch; DeepSpeed accumulates, reduces, clips, steps."""
    device, skipped = ranks.device(), engine.skipped_steps
    # cross-entropy, and the balancing loss of a model with experts
    totals = torch.zeros(2, device=device)
    activity("reading")
    for batch in batches:
        activity("forward")
        with memory.phase("forward"):
            loss = engine(**{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
        activity("backward")
        with memory.phase("backward"):
            engine.backward(nonfinite.poisoned(loss))
        totals[0] += loss.detach()
        if engine.module.balance_loss is not None:
            totals[1] += engine.module.balance_loss
        norm = reduced_gradient_norm(engine)
        activity("step")
        if engine.is_gradient_accumulation_boundary():
            before_update()
        with memory.phase("step"):
            engine.step()
        activity("reading")
    own_losses = totals / engine.gradient_accumulation_steps()
    asked = torch.tensor(requests.own()).to(device, non_blocking=True)
    shared = ranks.mean_over_ranks(torch.cat([own_losses, asked]))
    norm = torch.as_tensor(engine.get_global_grad_norm() if norm is None else norm)
    numbers = [shared, own_losses[:1], norm.to(device, non_blocking=True).view(1)]
    # Here alone the host waits for the device, beside DeepSpeed's own look at the gradients in the step.
    loss, balance_loss, *agreed, own, grad_norm = torch.cat([number.double() for number in numbers]).tolist()
    requests.agree(*agreed)
    was_skipped = engine.skipped_steps > skipped
    if was_skipped:
        nonfinite.forget_gradients(engine)
    has_experts = engine.module.balance_loss is not None
    return Update(loss, balance_loss if has_experts else None, own, grad_norm, was_skipped)


def uncount_step(engine: DeepSpeedEngine) -> None:
    """Let DeepSpeed count a step that is computed twice once."""
    engine.global_steps -= 1
    engine.global_samples -= engine.train_batch_size()
    engine.skipped_steps -= 1


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    """The learning rate of the next optimizer update: `rate` is AdamW's, and Muon's is in proportion to it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("rate_ratio", 1.0)


def reduced_gradient_norm(engine: DeepSpeedEngine) -> torch.Tensor | None:
    """Norm of the reduced gradients where DeepSpeed keeps none, before its step clips them: fp32 at stage 0, where the
    optimizer is told to leave the step out if it is not finite."""
    if not (engine.is_gradient_accumulation_boundary() and isinstance(engine.optimizer, SkippingAdamW)):
        return None
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.optimizer.overflow = not norm.isfinite()
    return norm
