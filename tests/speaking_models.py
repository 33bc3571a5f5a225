"""Untrained models in folders as transformers writes them, for tests of what models say: they say anything, bytes that
make no characters included."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from dsllm.data.tokenizer import token_count
from dsllm.data.vocabulary import END_OF_TEXT, fast_tokenizer, train_bpe, train_sentencepiece
from dsllm.spec.sections import BpeTokenizer, SentencePieceTokenizer
from tests.small_text import WORDS

VOCAB_SIZE = 400
PADDED_VOCAB_SIZE = 512
TEXT = [
    "def main(arguments):\n    print('hello')\n\n\nclass Größe:\n    def höhe(self):\n        return self.höhe\n" * 4,
    "the quick brown fox jumps over the lazy dog; " * 8,
    " ".join(WORDS) * 2,
    "日本語のテキスト、そして 🦊 と emoji. " * 3,
]
Vocabulary = Literal["bpe", "sentencepiece"]
Family = Literal["gpt2", "llama", "bloom"]


def make_tokenizer(kind: Vocabulary) -> PreTrainedTokenizerFast:
    """A vocabulary of which most tokens are bytes and short pieces."""
    if kind == "bpe":
        tokenizer = train_bpe(BpeTokenizer(kind="bpe", vocab_size=VOCAB_SIZE), TEXT)
    else:
        settings = SentencePieceTokenizer(kind="sentencepiece", vocab_size=VOCAB_SIZE)
        tokenizer = fast_tokenizer(train_sentencepiece(settings, TEXT))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def write_model(folder: Path, family: Family = "gpt2", vocabulary: Vocabulary = "bpe", positions: int = 64) -> Path:
    """A model of two layers with its tokenizer, its embeddings padded; the same at every call."""
    tokenizer = make_tokenizer(vocabulary)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(family, positions))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)  # far from uniform, so that the likeliest token is no toss-up
    assert token_count(tokenizer) == VOCAB_SIZE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(family: Family, positions: int) -> PretrainedConfig:
    # untied, so that the likeliest token is not the last one again
    common = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    if family == "gpt2":
        return GPT2Config(vocab_size=PADDED_VOCAB_SIZE, n_positions=positions, n_embd=32, n_layer=2, n_head=2, **common)
    if family == "llama":
        return LlamaConfig(
            vocab_size=PADDED_VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=positions,
            **common,
        )
    return BloomConfig(vocab_size=PADDED_VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=2, **common)
