"""Published runs whose settings and speed are known: what the prediction has to answer to.

Each is described as it was run, which decides what is counted: fused kernels where its authors wrote or compiled them,
reductions that overlap where they do. Nothing else differs between the predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsllm.plan.cost import SECONDS_PER_HOUR, Machine, run_cost, step_time
from dsllm.plan.hardware import gpu_named
from dsllm.plan.model_shape import ModelShape
from dsllm.plan.work import Kernels
from dsllm.plan.workload import Workload, ZeroSettings
from dsllm.units import round_up

Quantity = Literal["minutes", "seconds a step", "tokens/s/GPU", "hours"]


@dataclass(frozen=True)
class KnownRun:
    """A published run, and what its authors report of it."""

    name: str
    run: Workload
    gpu: str
    num_gpus: int
    micro_batch_size: int
    kernels: Kernels
    quantity: Quantity
    reported: tuple[float, float]
    """Lowest and highest figure that is stated."""
    source: str
    node_price: float | None = None

    def predict(self) -> float:
        """What the assumptions give for the quantity that is reported."""
        machine = Machine.of(gpu_named(self.gpu), self.num_gpus)
        step = step_time(self.run, machine, self.micro_batch_size, self.kernels)
        cost = run_cost(self.run, machine, step, self.node_price)
        return {
            "minutes": cost.run_seconds / 60,
            "seconds a step": step.total_seconds,
            "tokens/s/GPU": cost.tokens_per_second / self.num_gpus,
            "hours": cost.run_seconds / SECONDS_PER_HOUR,
        }[self.quantity]

    def error(self) -> float:
        """Predicted over reported, less 1; against the nearest end where a range is reported, 0 within it."""
        predicted, (low, high) = self.predict(), self.reported
        return predicted / min(max(predicted, low), high) - 1


def shape(
    family: Literal["gpt2", "llama"],
    layers: int,
    width: int,
    heads: int,
    vocab_size: int,
    *,
    key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    positions: int = 1024,
    tied: bool = True,
) -> ModelShape:
    """A model's sizes as papers list them; the vocabulary is padded to a multiple of 128."""
    return ModelShape(
        family=family,
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads,
        head_size=width // heads,
        intermediate_size=intermediate_size or 4 * width,
        max_position_embeddings=positions,
        vocab_size=vocab_size,
        padded_vocab_size=round_up(vocab_size, 128),
        tie_word_embeddings=tied,
    )


KNOWN_RUNS = (
    KnownRun(
        name="GPT-2 124M, 10B tokens, llm.c",
        run=Workload(
            shape=shape("gpt2", 12, 768, 12, 50257),
            sequence_length=1024,
            global_batch_size=512,
            micro_batch_size=64,
            train_steps=18865,
            loss="fused",
            zero=ZeroSettings(stage=1, overlap_comm=True),
        ),
        gpu="a100-80gb",
        num_gpus=8,
        micro_batch_size=64,
        kernels="fused",
        quantity="minutes",
        reported=(94.3, 94.3),
        source="https://github.com/karpathy/llm.c/blob/master/scripts/run_gpt2_124M.sh",
    ),
    KnownRun(
        name="GPT-2 1558M, llm.c",
        run=Workload(
            shape=shape("gpt2", 48, 1600, 25, 50257),
            sequence_length=1024,
            global_batch_size=1024,
            micro_batch_size=16,
            train_steps=32000,
            loss="fused",
            zero=ZeroSettings(stage=1, overlap_comm=True),
        ),
        gpu="h100-80gb",
        num_gpus=8,
        micro_batch_size=16,
        kernels="fused",
        quantity="seconds a step",
        reported=(2.70, 2.80),
        source="https://github.com/karpathy/llm.c/blob/master/scripts/run_gpt2_1558M.sh",
    ),
    KnownRun(
        name="TinyLlama 1.1B, FSDP, two nodes",
        run=Workload(
            shape=shape(
                "llama",
                22,
                2048,
                32,
                32000,
                key_value_heads=4,
                intermediate_size=5632,
                positions=2048,
                tied=False,
            ),
            sequence_length=2048,
            global_batch_size=1024,
            micro_batch_size=8,
            train_steps=1430000,
            loss="fused",
            zero=ZeroSettings(stage=3),
        ),
        gpu="a100-40gb",
        num_gpus=16,
        micro_batch_size=8,
        kernels="fused",
        quantity="tokens/s/GPU",
        reported=(24000, 24000),
        source="https://github.com/jzhang38/TinyLlama",
    ),
    KnownRun(
        name="MPT 1.3B at 2048, llm-foundry, FSDP",
        run=Workload(
            shape=shape("gpt2", 24, 2048, 16, 50368, positions=2048),
            sequence_length=2048,
            global_batch_size=112,
            micro_batch_size=14,
            train_steps=1,
            loss="plain",
            zero=ZeroSettings(stage=3),
        ),
        gpu="h100-80gb",
        num_gpus=8,
        micro_batch_size=14,
        kernels="eager",
        quantity="tokens/s/GPU",
        reported=(45455, 45455),
        source="https://github.com/mosaicml/llm-foundry/tree/main/scripts/train/benchmarking",
    ),
    KnownRun(
        name="lilLM 39M, 8B tokens, compiled, DDP",
        run=Workload(
            shape=shape("llama", 12, 512, 16, 8192, key_value_heads=8, intermediate_size=1408, positions=512),
            sequence_length=512,
            global_batch_size=1024,
            micro_batch_size=128,
            train_steps=15259,  # 8e9 tokens
            loss="fused",
            zero=ZeroSettings(stage=0, overlap_comm=True),
        ),
        gpu="a100-80gb",
        num_gpus=2,
        micro_batch_size=128,
        kernels="fused",
        quantity="hours",
        reported=(2.0, 2.5),
        source="https://github.com/CohleM/lilLM",
        node_price=2.475,
    ),
)
"""lilLM's batch, shape and flash attention are those of its commit 41d5ab0 and the one after it, before its run."""
