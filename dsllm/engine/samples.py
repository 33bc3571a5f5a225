"""Text that a model writes while it trains, the same whatever the ZeRO stage and number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine

from dsllm.data.tokenizer import load_tokenizer, token_count
from dsllm.engine import ranks
from dsllm.engine.activity import Activity
from dsllm.errors import UserError
from dsllm.model.build import model_config
from dsllm.model.continuation import choose_token, continue_prompts
from dsllm.model.generate import encode_prompt
from dsllm.model.positions import num_positions
from dsllm.model.text_stream import decode
from dsllm.spec.sections import Samples, Spec


class Prompts(NamedTuple):
    """The spec's prompts as the model reads them."""

    ids: list[list[int]]
    end_id: int
    num_tokens: int
    """Of the vocabulary; rows of logits beyond only pad it."""
    num_positions: int | None


def read_prompts(spec: Spec, tokenizer_folder: Path) -> Prompts | None:
    """Encode `evaluation.samples.prompts`; None where the spec wants no samples.

    Raises UserError for a prompt that leaves the model no room.
    """
    if spec.evaluation.samples is None:
        return None
    tokenizer, positions = load_tokenizer(tokenizer_folder), num_positions(model_config(spec))
    ids = [encode_prompt(tokenizer, prompt) for prompt in spec.evaluation.samples.prompts]
    for index, prompt in enumerate(ids):
        if positions is not None and len(prompt) >= positions:
            raise UserError(
                f"evaluation.samples.prompts.{index}: given {len(prompt)} tokens; the model has {positions} positions, "
                "and must find room behind them; shorten it"
            )
    return Prompts(ids, tokenizer.eos_token_id, token_count(tokenizer), positions)


def write_samples(
    engine: DeepSpeedEngine,
    settings: Samples,
    prompts: Prompts,
    *,
    seed: int,
    micro_batch_size: int,
    tokenizer_folder: Path,
    activity: Activity,
) -> dict[str, Any]:
    """What a step's record says of the text behind each prompt: `samples`, a list of `prompt` and `text`; collective.

    Every rank makes the same forwards, because ZeRO-3 gathers weights in each, for the tokens that rank 0 chooses. The
    draws depend on the seed, the step and the prompt's number alone, and on no generator of the training.
    """
    generators = [_generator(seed, engine.global_steps, number) for number in range(len(prompts.ids))]

    def next_logits(ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        activity("samples")
        logits: torch.Tensor = engine(input_ids=ids.to(ranks.device()), logits_at=last.to(ranks.device()))
        return logits[:, : prompts.num_tokens]

    def choose(logits: torch.Tensor, numbers: Sequence[int]) -> list[int]:
        rows = logits.float().cpu()
        chosen = [
            choose_token(row, settings.temperature, settings.top_k, generators[number])
            for row, number in zip(rows, numbers, strict=True)
        ]
        # The same everywhere, but for a rounding on another device.
        agreed: list[int] = ranks.of_rank_0(torch.tensor(chosen, device=ranks.device())).tolist()
        return agreed

    engine.eval()
    # Each length would have compiled blocks compiled again.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        written = continue_prompts(
            prompts.ids,
            next_logits,
            choose,
            max_new_tokens=settings.max_new_tokens,
            num_positions=prompts.num_positions,
            end_id=prompts.end_id,
            at_once=micro_batch_size,  # no more than in training
        )
    engine.train()
    return {"samples": ranks.on_rank_0(lambda: _texts(tokenizer_folder, settings.prompts, prompts.ids, written))}


def _generator(seed: int, step: int, number: int) -> torch.Generator:
    """What draws behind one prompt: of its own, so that what is drawn does not depend on where others end."""
    digest = hashlib.sha256(f"samples:{seed}:{step}:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _texts(
    tokenizer_folder: Path, prompts: Sequence[str], ids: Sequence[list[int]], written: Sequence[list[int]]
) -> list[dict[str, str]]:
    tokenizer = load_tokenizer(tokenizer_folder)
    beginnings = [len(decode(tokenizer, prompt)) for prompt in ids]
    wholes = [decode(tokenizer, prompt + more) for prompt, more in zip(ids, written, strict=True)]
    return [
        {"prompt": prompt, "text": whole[beginning:]}
        for prompt, whole, beginning in zip(prompts, wholes, beginnings, strict=True)
    ]
