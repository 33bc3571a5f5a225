"""The run's tokenizer: trained or fetched once, then a Hugging Face folder that every later step reads.

transformers takes seconds to import, so the functions that need it do: data that is already prepared is reused at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from dsllm.data.held_out import key_number
from dsllm.data.sources.catalogue import documents
from dsllm.data.token_ids import SENTENCEPIECE_FILE, TOKENIZER_FILE, TokenIds, read_tokenizer, readable
from dsllm.data.vocabulary import END_OF_TEXT, fast_tokenizer, train_bpe, train_sentencepiece
from dsllm.errors import DataError, UserError, one_line
from dsllm.spec.derived import vocab_size
from dsllm.spec.sections import BpeTokenizer, PretrainedTokenizer, SentencePieceTokenizer, Source, Spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The general class under its two names, and GPT-2's; what they read is in tokenizer.json.
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast")


def build_tokenizer(
    spec: Spec, directory: Path, held_out_below: int = 0, *, skip_bad_lines: bool = False
) -> PreTrainedTokenizerFast:
    """Train or fetch the spec's tokenizer and save it in `directory`.

    The folder is a plain Hugging Face one; beside it lies `sentencepiece.model` where that was trained. Documents whose
    `key_number` is below `held_out_below` are not trained on, nor are `data.validation_sources`. Raises DataError for
    text or files that give no usable tokenizer, UserError for one that the model cannot hold.
    """
    directory.mkdir(parents=True, exist_ok=True)
    match spec.tokenizer:
        case PretrainedTokenizer():
            tokenizer = fetch_tokenizer(spec.tokenizer)
            model_file = _original_of(tokenizer, Path(spec.tokenizer.name).expanduser())
        case SentencePieceTokenizer():
            texts = _training_texts(spec, spec.tokenizer, held_out_below, skip_bad_lines)
            model_file = train_sentencepiece(spec.tokenizer, texts)
            tokenizer = _wrap(fast_tokenizer(model_file))
        case BpeTokenizer():
            texts = _training_texts(spec, spec.tokenizer, held_out_below, skip_bad_lines)
            model_file, tokenizer = None, _wrap(train_bpe(spec.tokenizer, texts))
    check_vocabulary(spec, token_count(tokenizer))
    _save(tokenizer, directory)
    if model_file is not None:
        (directory / SENTENCEPIECE_FILE).write_bytes(model_file)
    if isinstance(spec.tokenizer, PretrainedTokenizer):
        _refuse_forgeries(spec.tokenizer.name, tokenizer, directory)
    return tokenizer


def train_tokenizer(spec: Spec, directory: Path, held_out_below: int, *, skip_bad_lines: bool = False) -> int:
    """Train the spec's tokenizer into a folder of its own, which is written whole or not at all; its token count.

    Raises UserError for a spec whose tokenizer exists already, or a folder that holds other files or another tokenizer.
    """
    if isinstance(spec.tokenizer, PretrainedTokenizer):
        raise UserError(
            f"tokenizer.kind: given pretrained, {spec.tokenizer.name!r}, which is trained already; "
            f"set tokenizer.kind to sentencepiece or bpe"
        )
    held = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if held and TOKENIZER_FILE not in held:
        raise UserError(f"{directory}: holds {held[0]}, which is no tokenizer; choose an empty folder with --out")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as folder:
        made = Path(folder) / "tokenizer"
        tokenizer = build_tokenizer(spec, made, held_out_below, skip_bad_lines=skip_bad_lines)
        if not held:
            os.replace(made, directory)
        elif (directory / TOKENIZER_FILE).read_bytes() != (made / TOKENIZER_FILE).read_bytes():
            raise UserError(f"{directory}: holds another tokenizer; delete the folder, or choose another with --out")
    return token_count(tokenizer)


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerFast:
    """The tokenizer that `build_tokenizer` saved; never runs code that a folder brings."""
    read_tokenizer(directory)  # says what is wrong in one line
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def token_count(tokenizer: PreTrainedTokenizerFast | Tokenizer) -> int:
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


def training_texts(
    sources: Sequence[Source], training_bytes: int, held_out_below: int = 0, *, skip_bad_lines: bool = False
) -> Iterator[str]:
    """Text from the start of every source, `training_bytes` of UTF-8 in all, in equal parts: weights, which can change
    any day, do not show in what is prepared. Documents whose `key_number` is below `held_out_below` are left out."""
    for source in sources:
        room = training_bytes // len(sources)
        if room == 0:
            continue  # not even opened: it may be large, or on the Hub
        for document in documents(source, skip_bad_lines=skip_bad_lines):
            if key_number(document.key) < held_out_below:
                continue
            encoded = readable(document.text).encode("utf-8")[:room]
            yield encoded.decode("utf-8", errors="ignore")  # the cut may fall inside a character
            room -= len(encoded)
            if room <= 0:
                break


def _training_texts(
    spec: Spec, config: SentencePieceTokenizer | BpeTokenizer, held_out_below: int, skip_bad_lines: bool
) -> list[str]:
    sources = spec.data.sources
    texts = list(training_texts(sources, config.training_bytes, held_out_below, skip_bad_lines=skip_bad_lines))
    if not texts:
        raise DataError(
            f"tokenizer.training_bytes: given {config.training_bytes}; there is no text to train it on; "
            f"give more text, or hold less of it out"
        )
    return texts


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


def _save(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Raises OSError where the disk is full or fails, for which `tokenizers` has only a bare Exception."""
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(directory)) from error
        raise


def _original_of(tokenizer: PreTrainedTokenizerFast, folder: Path) -> bytes | None:
    """The sentencepiece model of a folder whose tokenizer is the twin that dsllm makes of it, else None."""
    file = folder / SENTENCEPIECE_FILE
    if not file.is_file():
        return None
    model_file = file.read_bytes()
    return model_file if fast_tokenizer(model_file).to_str() == tokenizer.backend_tokenizer.to_str() else None


def fetch_tokenizer(config: PretrainedTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer by folder or Hub name. Raises DataError for one that cannot be had or used."""
    from transformers import PreTrainedTokenizerFast

    name = f"tokenizer.name: given {config.name!r}"
    folder = Path(config.name).expanduser()
    if config.name.startswith(("/", "./", "../", "~")) and not folder.is_dir():
        raise DataError(f"{name}; there is no such folder; correct the path")
    try:
        tokenizer = _loader(folder).from_pretrained(
            str(folder) if folder.is_dir() else config.name,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:  # of many kinds; a damaged tokenizer.json raises a bare Exception
        raise DataError(
            f"{name}; it cannot be loaded ({one_line(error)}); check the name and the network, "
            f"or set it to a local folder that save_pretrained wrote where there is a network"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"{name}; it has no fast version ({TOKENIZER_FILE}); choose a tokenizer that has one")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{name}; it has no end-of-text token (eos_token) to set between documents; choose another")
    return tokenizer


def _loader(folder: Path) -> Any:
    """What loads a tokenizer: the class that a local folder names, where it is one that AutoTokenizer would take too,
    because AutoTokenizer imports torch to find out."""
    import transformers

    config_file = folder / "tokenizer_config.json"
    if (folder / TOKENIZER_FILE).is_file() and config_file.is_file() and not (folder / "config.json").exists():
        named = json.loads(config_file.read_text(encoding="utf-8"))
        if named.get("tokenizer_class") in _PLAIN_CLASSES and "auto_map" not in named:
            return getattr(transformers, named["tokenizer_class"])
    return transformers.AutoTokenizer


def _refuse_forgeries(name: str, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """DataError where plain text that spells end-of-text becomes that token, and could cut a document in two."""
    (ids,) = TokenIds.open(directory).encode([tokenizer.eos_token])
    if tokenizer.eos_token_id in ids:
        raise DataError(
            f"tokenizer.name: given {name!r}; it reads its end-of-text token {tokenizer.eos_token!r} out of plain "
            f"text, so that a document could forge the end of another; choose another"
        )
