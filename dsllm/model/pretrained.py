"""A whole model and its tokenizer from a Hugging Face folder, to compute with; what is broken is refused, where
transformers would draw weights at random or make an empty tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dsllm.errors import UserError, first_line
from dsllm.model.configs import check_is_causal
from dsllm.model.source import Source, is_quantised, read_config
from dsllm.model.source_files import weight_files
from dsllm.model.source_tokenizer import folder_tokenizer


def load_pretrained(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """On the CPU, in fp32 where weights are not quantised.

    Raises UserError where configuration, weights or tokenizer are missing, damaged or not of each other, and for what
    does not predict the next token.
    """
    config = read_config(folder, to_train=False)
    if is_quantised(config):
        check_is_causal(config, str(folder))
        weight_files(folder)  # of which transformers alone knows what they hold
    else:
        Source(folder, to_train=False)
    tokenizer = folder_tokenizer(folder, "copy its files again")
    if tokenizer is None:
        raise UserError(f"{folder}: there is no tokenizer in it; copy the model's tokenizer beside its weights")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    except (ImportError, RuntimeError, ValueError) as error:  # most often a library that unpacks quantised weights
        raise UserError(
            f"{folder}: transformers cannot load its weights ({first_line(error)}); mend that, or give the model in "
            "bf16 or fp32"
        ) from error
    return model.eval(), tokenizer
