"""The run's tokenizer: trained or fetched once, then a Hugging Face folder that every later step reads.

transformers takes seconds to import, so the functions that need it do: data that is already prepared is reused at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from dsllm.data.sources import documents
from dsllm.data.vocabulary import END_OF_TEXT, fast_tokenizer, train_bpe, train_sentencepiece
from dsllm.errors import DataError, UserError
from dsllm.spec.derived import vocab_size
from dsllm.spec.sections import BpeTokenizer, PretrainedTokenizer, SentencePieceTokenizer, Source, Spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTENCEPIECE_FILE = "sentencepiece.model"
TOKENIZER_FILE = "tokenizer.json"


def build_tokenizer(spec: Spec, directory: Path) -> PreTrainedTokenizerFast:
    """Train or fetch the spec's tokenizer and save it in `directory`.

    The folder is a plain Hugging Face one; beside it lies `sentencepiece.model` where that was trained. Raises
    DataError for text or files that give no usable tokenizer, UserError for one that the model cannot hold.
    """
    directory.mkdir(parents=True, exist_ok=True)
    match spec.tokenizer:
        case PretrainedTokenizer():
            tokenizer = _fetch(spec.tokenizer)
        case SentencePieceTokenizer():
            texts = training_texts(spec.data.sources, spec.tokenizer.training_bytes)
            model_file = train_sentencepiece(spec.tokenizer, list(texts))
            (directory / SENTENCEPIECE_FILE).write_bytes(model_file)
            tokenizer = _wrap(fast_tokenizer(model_file))
        case BpeTokenizer():
            texts = training_texts(spec.data.sources, spec.tokenizer.training_bytes)
            tokenizer = _wrap(train_bpe(spec.tokenizer, texts))
    check_vocabulary(spec, token_count(tokenizer))
    tokenizer.save_pretrained(directory)
    return tokenizer


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerFast:
    """The tokenizer that `build_tokenizer` saved; never runs code that a folder brings."""
    if not (Path(directory) / TOKENIZER_FILE).is_file():
        raise DataError(f"{directory}: no {TOKENIZER_FILE} in it; prepare the data first (dsllm data prepare)")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def token_count(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id, which is what an embedding must hold: a vocabulary may have gaps."""
    return 1 + max(tokenizer.get_vocab().values())


def check_vocabulary(spec: Spec, num_tokens: int) -> None:
    """Raises UserError where the tokenizer has more tokens than the model is built for."""
    limit = vocab_size(spec.model, spec.tokenizer)
    if limit is not None and num_tokens > limit:
        raise UserError(
            f"model.vocab_size: the tokenizer has {num_tokens} tokens and the model is built for {limit}; "
            f"set model.vocab_size to {num_tokens} or more"
        )


def training_texts(sources: Sequence[Source], training_bytes: int) -> Iterator[str]:
    """Text from the start of every source, `training_bytes` of UTF-8 in all, shared out by weight."""
    total_weight = sum(source.weight for source in sources)
    for source in sources:
        room = int(training_bytes * source.weight / total_weight)
        for document in documents(source):
            encoded = document.text.encode("utf-8")[:room]
            yield encoded.decode("utf-8", errors="ignore")  # the cut may fall inside a character
            room -= len(encoded)
            if room <= 0:
                break


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The Hugging Face face of a trained tokenizer. End-of-text begins a text too, as GPT-2 has it: in the training
    data it stands before every document but the first."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _fetch(config: PretrainedTokenizer) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name = f"tokenizer.name: given {config.name!r}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{name}; it cannot be loaded ({' '.join(str(error).split())}); check the name and the network, "
            f"or set it to a folder written by save_pretrained"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"{name}; it has no fast version ({TOKENIZER_FILE}); choose a tokenizer that has one")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{name}; it has no end-of-text token (eos_token) to set between documents; choose another")
    return tokenizer
