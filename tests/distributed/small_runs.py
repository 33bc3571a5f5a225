"""Small engines for the parity tests: the same specs in the test's process and on the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec
from tests.distributed.reference import ReferenceRun, train_reference

GLOBAL_BATCH_SIZE = 8
SEQUENCE_LENGTH = 32
PEAK_LEARNING_RATE = 3e-3

FAMILIES = {
    "gpt2": ["model={family: gpt2, num_layers: 2, hidden_size: 64, num_attention_heads: 4}"],
    "llama": ["model={family: llama, num_layers: 2, hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2}"],
}


def small_spec(family: str, stage: int, *overrides: str) -> Spec:
    """Two layers of width 64 over 500 tokens, in fp32 unless overridden."""
    return load_spec(
        "quickstart",
        [
            *FAMILIES[family],
            "model.max_position_embeddings=32",
            "tokenizer={kind: bpe, vocab_size: 500}",
            "batch.micro_batch_size=1",
            f"batch.sequence_length={SEQUENCE_LENGTH}",
            f"batch.global_batch_size={GLOBAL_BATCH_SIZE}",
            f"zero={{stage: {stage}}}",
            "training={train_steps: 100, precision: fp32}",
            *overrides,
        ],
    )


def global_batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and shifted labels, (8, 32) each; every fourth step repeats, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(500, (4, GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH + 1), generator=generator)
    return [(ids[step % 4, :, :-1].contiguous(), ids[step % 4, :, 1:].contiguous()) for step in range(steps)]


def warm_up(step: int) -> float:
    """Learning rate of a step."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 5)


def own_micro_batches(steps: int, rank: int, world_size: int, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's slice of each global batch, `size` sequences at a time."""
    share = GLOBAL_BATCH_SIZE // world_size
    for inputs, labels in global_batches(steps):
        for first in range(rank * share, (rank + 1) * share, size):
            yield {"input_ids": inputs[first : first + size], "labels": labels[first : first + size]}


def run_cases(cases: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """On every rank: train each case in turn; its losses, gradient norms, and a digest of its first weights."""
    return [run_case(steps=steps, **case) for case in cases]


def run_case(family: str, stage: int, accumulation: int, steps: int, overrides: list[str]) -> dict[str, Any]:
    """One case on this rank."""
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import guards, ranks
    from dsllm.engine.memory_meter import MemoryMeter
    from dsllm.engine.start import start_engine
    from dsllm.engine.trainer import set_learning_rate, train_step

    world = ranks.join()
    size = GLOBAL_BATCH_SIZE // (world.size * accumulation)
    spec = small_spec(family, stage, *overrides, f"batch.micro_batch_size={size}")
    engine = start_engine(spec, build_ds_config(spec, world.size, "cpu"))
    digest = weights_digest(engine.module)
    micro_batches = own_micro_batches(steps, world.rank, world.size, size)
    losses, norms, stop, memory = [], [], guards.StopRequest(), MemoryMeter(None)
    for step in range(steps):
        set_learning_rate(engine, warm_up(step))
        metrics = train_step(engine, micro_batches, stop, memory)
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    engine.destroy()
    return {"losses": losses, "norms": norms, "digest": digest}


def reference_run(family: str, steps: int, overrides: tuple[str, ...] = ()) -> ReferenceRun:
    """The same training as a plain PyTorch loop, in this process."""
    from dsllm.model.build import build_model, model_config
    from dsllm.model.initialize import initialize_weights

    spec = small_spec(family, 0, *overrides)
    model = build_model(model_config(spec), torch.float32)
    initialize_weights(model, spec.seed)
    return train_reference(
        model,
        global_batches(steps),
        learning_rate=warm_up,
        betas=spec.optimizer.betas,
        epsilon=spec.optimizer.epsilon,
        weight_decay=spec.optimizer.weight_decay,
        gradient_clipping=spec.optimizer.gradient_clipping,
        micro_batch_size=4,
    )


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 of every weight's bits, partitioned (ZeRO-3) or not; collective."""
    import deepspeed

    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            digest.update(name.encode() + parameter.detach().float().numpy().tobytes())
    return digest.hexdigest()
