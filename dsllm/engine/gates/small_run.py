"""A spec shrunk to what trains in seconds, and real steps of it: engine, JSON and loop are those of the run itself."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator

from dsllm.data.loader import MicroBatch
from dsllm.ds_config import build_ds_config
from dsllm.engine import ranks
from dsllm.engine.activity import Activity
from dsllm.engine.memory_meter import MemoryMeter
from dsllm.engine.requests import Requests
from dsllm.engine.start import start_engine
from dsllm.engine.trainer import set_learning_rate, train_step
from dsllm.model.build import build_model, model_config
from dsllm.model.gather import gathered
from dsllm.model.narrow import narrowed
from dsllm.model.shapes import shape_of
from dsllm.spec.derived import experts
from dsllm.spec.sections import AnyModel, Batch, BpeTokenizer, Optimizer, Scratch, Spec, Zero

VOCAB_SIZE = 300
SEQUENCE_LENGTH = 32
SEQUENCES = 4
"""Of each rank in a step."""
DISTINCT_SEQUENCES = 8
"""Over all ranks, so that what is to be learned by heart does not grow with their number."""
LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Steps:
    """What each of some steps gave, the same on every rank."""

    losses: list[float]
    """Nats a token, before the update."""
    gradient_norms: list[float]
    """Before clipping."""


def shrink(spec: Spec) -> Spec:
    """The spec with two narrow layers and 300 tokens; family, precision, ZeRO stage and offload stay as they are.

    Weight decay and dropout are off and the learning rate is that of a small model: the settings under test are those
    of the machinery, not of the optimisation. Nothing is compiled, which would take longer than all the rest.
    """
    training = spec.training.model_copy(
        # A scale that looks for its limit skips the first steps of a run, and not those of another.
        update={"compile": False, **({"loss_scale": 1024.0} if spec.training.precision == "fp16" else {})}
    )
    small = spec.model_copy(
        update={
            "model": _narrow(spec),
            "tokenizer": BpeTokenizer(kind="bpe", vocab_size=VOCAB_SIZE),
            "training": training,
            "optimizer": Optimizer(
                name=spec.optimizer.name,
                learning_rate=LEARNING_RATE,
                weight_decay=0.0,
                gradient_clipping=spec.optimizer.gradient_clipping,
                fused=spec.optimizer.fused,
            ),
        }
    )
    return small.model_copy(update={"zero": _fitted(spec.zero, shape_of(small).allocated_parameters)})


def at_stage(small: Spec, stage: int) -> Spec:
    """A shrunk spec at another ZeRO stage, with nothing offloaded and nothing tuned."""
    return small.model_copy(update={"zero": Zero(stage=stage)})


def own_tokens(rank: int) -> torch.Tensor:
    """Random token ids of this rank, the same at each call: (SEQUENCES, SEQUENCE_LENGTH + 1), int64."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB_SIZE, (DISTINCT_SEQUENCES, SEQUENCE_LENGTH + 1), generator=generator)
    return ids[torch.arange(rank * SEQUENCES, (rank + 1) * SEQUENCES) % DISTINCT_SEQUENCES]


@contextlib.contextmanager
def small_engine(small: Spec, world_size: int, gradient_accumulation_steps: int = 1) -> Iterator[DeepSpeedEngine]:
    """An engine of a shrunk spec, for the time of the block. Collective.

    zero.Init replaces torch's linear function for the rest of the process: it is put back, so that an engine of another
    stage is not a mixture.
    """
    linear = torch.nn.functional.linear
    batch = Batch(
        sequence_length=SEQUENCE_LENGTH,
        global_batch_size=SEQUENCES * world_size,
        micro_batch_size=SEQUENCES // gradient_accumulation_steps,
    )
    small = small.model_copy(update={"batch": batch})
    engine = start_engine(small, build_ds_config(small, world_size, ranks.device_type(), shape=shape_of(small)))
    yield engine
    engine.destroy()
    torch.nn.functional.linear = linear


def train(
    engine: DeepSpeedEngine,
    tokens: torch.Tensor,
    num_steps: int,
    requests: Requests,
    memory: MemoryMeter,
    activity: Activity,
) -> Steps:
    """Steps on `tokens` of `own_tokens`, all on the same. Collective."""
    micro_batches, steps = itertools.cycle(_micro_batches(engine, tokens)), Steps([], [])
    for _ in range(num_steps):
        set_learning_rate(engine, LEARNING_RATE)
        metrics, _ = train_step(engine, micro_batches, requests, memory, activity)
        steps.losses.append(metrics["loss"])
        steps.gradient_norms.append(metrics["grad_norm"])
    return steps


def next_token_loss(engine: DeepSpeedEngine, small: Spec, tokens: torch.Tensor) -> float:
    """Nats a token that the engine's weights lose on `tokens` of all ranks in a plain fp32 model of transformers'.

    Nothing of the training's own forward, loss or labels takes part, so that none of them can hide its fault.
    Collective.
    """
    plain = build_model(model_config(small), torch.float32).eval()
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in engine.module.causal_lm.named_parameters():
            with gathered(parameter):
                weights[name].copy_(parameter)
        logits = plain(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return float(ranks.mean_over_ranks(loss.to(ranks.device())))


def release_engines() -> None:
    """Give back what small engines held. Call it where no variable names one any more.

    Engines hold themselves in cycles, and BF16_Optimizer lets go of more only when it is gone. DeepSpeed keeps those of
    stage 3 alive in spite of all: about 3 MB a check.
    """
    gc.collect()
    gc.collect()
    get_accelerator().empty_cache()


def _narrow(spec: Spec) -> AnyModel:
    model = spec.model
    if model.family == "auto":
        config = narrowed(model_config(spec), vocab_size=VOCAB_SIZE, positions=SEQUENCE_LENGTH)
        written = {"config": config.to_dict(), "vocab_size": None, "vocab_padding_multiple": 128}
        return model.model_copy(update={"init": Scratch(), **written})
    has_groups = model.num_key_value_heads not in (None, model.num_attention_heads)
    num_experts, num_experts_per_token = experts(model)
    shape: dict[str, Any] = {
        "init": Scratch(),
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if has_groups else None,
        "head_size": None,
        "intermediate_size": 64 if num_experts else None,
        "max_position_embeddings": SEQUENCE_LENGTH,
        "vocab_size": None,
        "vocab_padding_multiple": 128,
        "dropout": 0.0,
        # half the window of the whole run, so that there is something to leave out
        "sliding_window": None if model.sliding_window is None else SEQUENCE_LENGTH // 2,
        "num_experts": min(num_experts, max(4, 2 * num_experts_per_token)) or None,
    }
    return model.model_copy(update=shape)


def _fitted(zero: Zero, parameters: int) -> Zero:
    """Sizes fitted to the small model, and several buckets to its gradients, as a large model has them."""
    fitted = dict.fromkeys(("gather_bucket_elements", "persistence_threshold_elements", "max_live_elements"))
    return zero.model_copy(update={**fitted, "reduce_bucket_elements": parameters // 3})


def _micro_batches(engine: DeepSpeedEngine, tokens: torch.Tensor) -> list[MicroBatch]:
    size = engine.train_micro_batch_size_per_gpu()
    return [{"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()} for rows in tokens.split(size)]
