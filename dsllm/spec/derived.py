"""What follows from a spec's fields alone, without files and without a world size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain, count
from typing import TYPE_CHECKING, Any

from dsllm.spec.config_keys import is_size, known_keys

if TYPE_CHECKING:
    from dsllm.spec.sections import AnyModel, AutoModel, Data, Model, Source, Spec, Tokenizer, Training

PRETRAINED_VOCAB_SIZES = {"gpt2": 50257}
"""Token counts of well-known pretrained tokenizers, so that predictions need no download."""


REMOTE_KINDS = ("huggingface", "deeplake")
"""Kinds of source that may come over the network: no run prepares them by itself."""


def remote_kind(data: Data) -> str | None:
    """The first kind of source that the data has and that no run prepares by itself."""
    sources = (*data.sources, *data.validation_sources)
    return next((source.kind for source in sources if source.kind in REMOTE_KINDS), None)


def tokenizer_vocab_size(tokenizer: Tokenizer) -> int | None:
    """Tokens of the tokenizer; None for a pretrained one whose size only its files tell."""
    if tokenizer.kind == "pretrained":
        return PRETRAINED_VOCAB_SIZES.get(tokenizer.name)
    return tokenizer.vocab_size


def vocab_size(model: AnyModel, tokenizer: Tokenizer) -> int | None:
    """Tokens that the model knows, before padding; None where neither section tells."""
    size = model.vocab_size or tokenizer_vocab_size(tokenizer)
    if size is None and model.family == "auto":
        written = written_config(model).get("vocab_size")
        return written if is_size(written) else None
    return size


NUM_EXPERTS, NUM_EXPERTS_PER_TOKEN = 8, 2
"""Mixtral's own (arXiv:2401.04088), where the spec leaves them out."""


def experts(model: Model) -> tuple[int, int]:
    """Feed-forward layers of a block to choose among, and how many of them a token takes; 0 in a dense family."""
    if model.family != "mixtral":
        return 0, 0
    return model.num_experts or NUM_EXPERTS, model.num_experts_per_token or NUM_EXPERTS_PER_TOKEN


def written_config(model: AutoModel) -> dict[str, Any]:
    """The keys of an automatic model's configuration; none where it has yet to be read from a folder or the Hub."""
    return model.config if isinstance(model.config, dict) else {}


def config_source(model: AutoModel) -> tuple[str, str | None]:
    """The folder or Hub name that an automatic model's configuration is read from, and the revision there."""
    if isinstance(model.config, str):
        return model.config, None
    assert model.init.kind == "pretrained", "the rules refuse a model without a configuration"
    return model.init.name, model.init.revision


OF_NO_BLOCK = ("summary", "classifier", "layerdrop")
"""In names of keys with "drop" that no activation passes."""
DROPOUT_DEFAULTS = dict.fromkeys(("gpt2", "gpt_bigcode", "gptj", "opt", "xglm", "biogpt"), 0.1)
"""transformers', of the types that drop out where their configuration says nothing."""


def dropout(model: AnyModel) -> float:
    """Of residuals and attention in training, the largest."""
    return dropout_of(written_config(model)) if model.family == "auto" else model.dropout


def dropout_of(config: Mapping[str, Any]) -> float:
    """The same of a configuration of transformers."""
    rates = [
        rate
        for key, rate in config.items()
        if "drop" in key and isinstance(rate, int | float) and not any(name in key for name in OF_NO_BLOCK)
    ]
    return max(rates, default=DROPOUT_DEFAULTS.get(str(config.get("model_type")), 0.0))


def initializer_range(model: AnyModel) -> float:
    """Standard deviation of the initial weights."""
    if model.family != "auto":
        return model.initializer_range
    config = written_config(model)
    deviation: float = config.get("initializer_range", config.get("init_std", 0.02))  # transformers' own default
    return deviation


def max_positions(model: AnyModel) -> int | None:
    """Tokens that the model reads at most; None where its configuration does not tell."""
    if model.family != "auto":
        return model.max_position_embeddings
    config = written_config(model)
    keys = known_keys(config) or config
    limits = (keys.get("max_position_embeddings"), keys.get("n_positions"))  # the latter is GPT-2's name
    return next((limit for limit in limits if is_size(limit)), None)


def train_steps(training: Training, tokens_per_step: int) -> int:
    """Optimizer steps of the run: the first reached of `train_steps` and `tokens`, the last step rounded up."""
    limits = []
    if training.train_steps is not None:
        limits.append(training.train_steps)
    if training.tokens is not None:
        limits.append(-(-training.tokens // tokens_per_step))
    return min(limits)


def data_directory(spec: Spec) -> str:
    """Where the spec's prepared data lives, as it is written: `~` is not expanded."""
    return spec.data.directory or f"data/{spec.name}"


def source_labels(data: Data) -> tuple[str, ...]:
    """A name for each of `sources` and then `validation_sources`: its own label, or one made from its path, all unlike
    each other where the given ones are."""
    labels: list[str] = []
    taken = {source.label for source in (*data.sources, *data.validation_sources)}
    for source in (*data.sources, *data.validation_sources):
        label = source.label or _unlike(_label_of(source), taken)
        taken.add(label)
        labels.append(label)
    return tuple(labels)


def _label_of(source: Source) -> str:
    """`corpora/news/*.jsonl.gz` -> `news`, `HuggingFaceFW/fineweb-edu` -> `fineweb-edu`."""
    if source.kind == "python-stdlib":
        return source.kind
    path = source.name if source.kind == "huggingface" else source.path
    parts = [part for part in path.split("/") if part and not re.search(r"[*?\[]", part)]
    stem = parts[-1].split(".")[0] if parts else ""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:40] or source.kind


def _unlike(label: str, taken: set[str | None]) -> str:
    """The label itself, or with the first number behind it that makes it a new one."""
    numbered = (f"{label}-{number}" for number in count(2))
    return next(name for name in chain([label], numbered) if name not in taken)
