"""Small engines for the parity tests: the same specs in the test's process and on the ranks."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec
from tests.distributed.reference import MuonSettings, ReferenceRun, train_reference

GLOBAL_BATCH_SIZE = 8
SEQUENCE_LENGTH = 32
PEAK_LEARNING_RATE = 3e-3

PACKED_ROWS = [[32], [10, 20], [1, 1, 30], [], [5], [31], [16, 16], [7, 8, 9]]
"""Lengths of the documents that are packed into each sequence; the rest is padding, and the fourth has nothing else."""

FAMILIES = {
    "gpt2": ["model={family: gpt2, num_layers: 2, hidden_size: 64, num_attention_heads: 4}"],
    "llama": ["model={family: llama, num_layers: 2, hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2}"],
    "mixtral": [
        "model={family: mixtral, num_layers: 2, hidden_size: 64, num_attention_heads: 4, intermediate_size: 96, "
        "num_experts: 4, balance_loss_weight: 0.0}"
    ],
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


def documents_alone(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The documents of PACKED_ROWS for each step, one in each row from position 0 on; what follows does not count."""
    batches = []
    for inputs, labels in global_batches(steps):
        rows = []
        for row, lengths in enumerate(PACKED_ROWS):
            for start, end in _segments(lengths):
                padding = (0, SEQUENCE_LENGTH - (end - start))
                document, targets = inputs[row, start:end], labels[row, start:end]
                rows.append(
                    (torch.nn.functional.pad(document, padding), torch.nn.functional.pad(targets, padding, value=-100))
                )
        batches.append((torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])))
    return batches


def packed_batches(steps: int) -> list[dict[str, torch.Tensor]]:
    """The same documents, packed: input ids, labels and position ids, (8, 32) each."""
    batches = []
    for inputs, labels in global_batches(steps):
        labels, position_ids = labels.clone(), torch.zeros_like(inputs)
        for row, lengths in enumerate(PACKED_ROWS):
            for start, end in _segments([*lengths, SEQUENCE_LENGTH - sum(lengths)]):
                position_ids[row, start:end] = torch.arange(end - start)
            labels[row, sum(lengths) :] = -100
        batches.append({"input_ids": inputs, "labels": labels, "position_ids": position_ids})
    return batches


def own_packed_micro_batches(steps: int, rank: int, world_size: int, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's slice of each packed global batch, `size` sequences at a time."""
    share = GLOBAL_BATCH_SIZE // world_size
    for batch in packed_batches(steps):
        loss_tokens = (batch["labels"] != -100).sum() / (GLOBAL_BATCH_SIZE // size)
        for first in range(rank * share, (rank + 1) * share, size):
            rows = {name: tensor[first : first + size] for name, tensor in batch.items()}
            yield {**rows, "loss_tokens": loss_tokens}


def _segments(lengths: list[int]) -> list[tuple[int, int]]:
    """Where documents of these lengths start and end, one behind the other."""
    ends = list(itertools.accumulate(lengths))
    return list(zip([0, *ends], ends, strict=False))


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


def run_case(
    family: str, stage: int, accumulation: int, steps: int, overrides: list[str], is_packed: bool = False
) -> dict[str, Any]:
    """One case on this rank."""
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import evaluation, ranks
    from dsllm.engine.activity import Activity
    from dsllm.engine.memory_meter import MemoryMeter
    from dsllm.engine.requests import Requests
    from dsllm.engine.start import start_engine
    from dsllm.engine.trainer import set_learning_rate, train_step

    world = ranks.join()
    size = GLOBAL_BATCH_SIZE // (world.size * accumulation)
    spec = small_spec(family, stage, *overrides, f"batch.micro_batch_size={size}")
    engine = start_engine(spec, build_ds_config(spec, world.size, "cpu"))
    digest = weights_digest(engine.module)
    read = own_packed_micro_batches if is_packed else own_micro_batches
    micro_batches = read(steps, world.rank, world.size, size)
    first_step = functools.partial(read, 1, world.rank, world.size, size)
    validation = evaluation.evaluate(engine, {"news": first_step, "code": first_step}, {"news": 1.0})
    losses, norms = [], []
    requests, memory, activity = Requests(), MemoryMeter(None), Activity()
    for step in range(steps):
        set_learning_rate(engine, warm_up(step))
        metrics, _ = train_step(engine, micro_batches, requests, memory, activity)
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    engine.destroy()
    return {"losses": losses, "norms": norms, "digest": digest, "validation": validation}


def reference_run(family: str, steps: int, overrides: tuple[str, ...] = (), is_packed: bool = False) -> ReferenceRun:
    """The same training as a plain PyTorch loop, in this process; of packed documents each one by itself."""
    from dsllm.model.build import build_model, model_config
    from dsllm.model.initialize import initialize_weights

    spec = small_spec(family, 0, *overrides)
    model = build_model(model_config(spec), torch.float32)
    initialize_weights(model, spec.seed)
    return train_reference(
        model,
        documents_alone(steps) if is_packed else global_batches(steps),
        learning_rate=warm_up,
        betas=spec.optimizer.betas,
        epsilon=spec.optimizer.epsilon,
        weight_decay=spec.optimizer.weight_decay,
        gradient_clipping=spec.optimizer.gradient_clipping,
        micro_batch_size=4,
        muon=_muon_settings(spec),
    )


def _muon_settings(spec: Spec) -> MuonSettings | None:
    settings = spec.optimizer
    if settings.name != "muon":
        return None
    return MuonSettings(settings.muon_learning_rate / settings.learning_rate, settings.muon_momentum)


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 of every weight's bits, partitioned (ZeRO-3) or not; collective."""
    import deepspeed

    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            digest.update(name.encode() + parameter.detach().float().numpy().tobytes())
    return digest.hexdigest()
