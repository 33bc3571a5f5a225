"""Text from a trained model."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsllm.errors import UserError


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    num_samples: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> list[str]:
    """`num_samples` continuations of `prompt`, the prompt included; the same for the same seed.

    `temperature` 0 takes the likeliest token each time; `top_k` 0 and `top_p` 1 leave the distribution whole. The text
    ends at the end-of-text token, or where the model's positions end. Raises UserError for a prompt that leaves no
    room, or several samples where each would be the same.
    """
    if temperature == 0 and num_samples > 1:
        raise UserError(f"--samples: given {num_samples} at --temperature 0, where all are the same; ask for 1")
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    if ids.shape[1] == 0:
        ids = torch.tensor([[tokenizer.eos_token_id]])
    room = model.config.max_position_embeddings - ids.shape[1]
    if room < 1:
        raise UserError(
            f"--prompt: given {ids.shape[1]} tokens; the model has {model.config.max_position_embeddings} positions; "
            "shorten it"
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(max_new_tokens, room),
        num_return_sequences=num_samples,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # Rows that only pad the vocabulary are no tokens.
        suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)) or None,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    return tokenizer.batch_decode(output, skip_special_tokens=True)
