"""The README of an exported model: a model card as the Hugging Face Hub reads it, of what its run's folder says."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from dsllm.checkpoint.run_facts import RunFacts
from dsllm.evaluation.validation import mix_shares
from dsllm.model.positions import num_positions
from dsllm.model.shapes import shape_of
from dsllm.plan.model_shape import ModelShape
from dsllm.spec.derived import source_labels
from dsllm.spec.sections import Optimizer, Pretrained, PretrainedTokenizer, Spec
from dsllm.spec.yaml_text import dump_yaml
from dsllm.units import format_count

Row = tuple[str, ...]

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
PATH_KEYS = ("path", "name", "directory", "nvme_path", "config")
"""Fields of a spec that may hold a path."""


def model_card(name: str, facts: RunFacts, model: PreTrainedModel) -> str:
    """The card of `model`, exported into a folder of this `name`."""
    spec, shape = facts.spec, shape_of(facts.spec)
    seen = f"{facts.checkpoint.step * spec.tokens_per_step:,} tokens"
    sections = [
        f"# {spec.name}",
        f"A {model.config.model_type} language model of {format_count(shape.parameters)} parameters, "
        f"{_lead(spec, seen)}",
        _usage(name),
        _table("Model", ("", ""), _model_rows(model, shape)),
        _table("Training", ("", ""), _training_rows(facts)),
        _table("Results", ("", "", "after step"), _result_rows(facts)),
        _table("Data", ("source", "kind", "share", "documents", "tokens"), _data_rows(facts)),
        _tokenizer(facts),
        _table("Versions", ("", ""), _version_rows(facts.passport)),
        _reproduction(facts),
    ]
    return f"---\n{_metadata(facts, model).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _lead(spec: Spec, seen: str) -> str:
    """What was done to the model, and what it can do; of one that it started from only the name is known."""
    init = spec.model.init
    if isinstance(init, Pretrained):
        return f"which started from {_last_part(init.name)} and was trained on {seen} more with dsllm on DeepSpeed."
    skill = "It goes on with text; it was not taught to follow instructions."
    return f"pre-trained on {seen} with dsllm on DeepSpeed. {skill}"


def _metadata(facts: RunFacts, model: PreTrainedModel) -> ModelCardData:
    """The front matter. No licence: nothing here knows one."""
    spec, init = facts.spec, facts.spec.model.init
    sets = [source.name for source in spec.data.sources if source.kind == "huggingface" and _is_on_hub(source.name)]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dsllm", "deepspeed", model.config.model_type],
        base_model=init.name if isinstance(init, Pretrained) and _was_on_hub(facts.passport) else None,
        datasets=sets or None,
    )


def _was_on_hub(passport: Mapping[str, Any]) -> bool:
    """Whether the model that a run started from was no folder when it did: the folder may be gone since."""
    return passport.get("init", {}).get("is_folder") is False


def _is_on_hub(name: str) -> bool:
    """Whether a name can be one of the Hub's, and is no folder here."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _usage(name: str) -> str:
    code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{name}"  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=50)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""
    return f"## Use\n\n{_fenced('python', code)}"


def _model_rows(model: PreTrainedModel, shape: ModelShape) -> Iterator[Row]:
    padding = shape.allocated_parameters - shape.parameters
    active = f", {shape.active_parameters:,} of them active for each token" if shape.num_experts > 1 else ""
    positions = num_positions(model.config)
    yield "class", f"`{type(model).__name__}`"
    yield "parameters", f"{shape.parameters:,}{active}" + (f"; {padding:,} more pad the vocabulary" if padding else "")
    yield "layers", f"{shape.num_layers:,}"
    yield "width", f"{shape.hidden_size:,}; {shape.intermediate_size:,} in feed-forward layers"
    yield "heads", f"{shape.num_attention_heads:,}; {shape.num_key_value_heads:,} of keys and values"
    if shape.num_experts > 1:
        yield "experts", f"{shape.num_experts:,}; {shape.num_experts_per_token:,} for each token"
    if positions is not None:
        yield "positions", f"{positions:,}"
    yield "vocabulary", f"{shape.vocab_size:,} tokens in {shape.padded_vocab_size:,} rows"
    yield "embedding and head", "shared" if shape.tie_word_embeddings else "apart"
    yield "weights", str(model.dtype).removeprefix("torch.")


def _training_rows(facts: RunFacts) -> Iterator[Row]:
    spec, checkpoint, passport = facts.spec, facts.checkpoint, facts.passport
    yield "from", _beginning(spec)
    yield "steps", f"{checkpoint.step:,} of {spec.train_steps:,}"
    yield "tokens seen", f"{checkpoint.step * spec.tokens_per_step:,}"
    batch, length = spec.batch.global_batch_size, spec.batch.sequence_length
    yield "batch", f"{batch:,} sequences of {length:,} tokens: {spec.tokens_per_step:,} tokens a step"
    yield "optimizer", _optimizer(spec.optimizer)
    schedule = spec.schedule
    end = "" if schedule.name == "constant" else f", then to {schedule.min_learning_rate_ratio:g} of the peak"
    yield "schedule", f"{schedule.name}: {schedule.warmup_steps:,} steps of warm-up{end}"
    yield "precision", checkpoint.precision
    yield "ZeRO stage", str(spec.zero.stage if checkpoint.zero_stage is None else checkpoint.zero_stage)
    if (ranks := checkpoint.world_size or passport.get("world_size")) is not None:
        yield "ranks", f"{ranks:,}" + (f" on {passport['device']}" if "device" in passport else "")


def _optimizer(optimizer: Optimizer) -> str:
    adamw = (
        f"AdamW, learning rate {optimizer.learning_rate:g}, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, "
        f"weight decay {optimizer.weight_decay:g}"
    )
    muon = f"Muon, learning rate {optimizer.muon_learning_rate:g}, for the matrices of blocks; for the rest "
    clipping = f"; gradients clipped at {optimizer.gradient_clipping:g}" if optimizer.gradient_clipping else ""
    return f"{muon if optimizer.name == 'muon' else ''}{adamw}{clipping}"


def _beginning(spec: Spec) -> str:
    init = spec.model.init
    if not isinstance(init, Pretrained):
        return f"weights drawn at random, seed {spec.seed}"
    revision = f" at {init.revision}" if init.revision else ""
    layers = f", its layers {init.layers}" if init.layers else ""
    return f"the weights of {_last_part(init.name)}{revision}{layers}"


def _result_rows(facts: RunFacts) -> Iterator[Row]:
    measured = facts.measured
    if "loss" in measured:
        yield "loss in training", f"{measured['loss'].value:.4f}", f"{measured['loss'].step:,}"
    if "val_losses" in measured:
        losses, step = measured["val_losses"]
        for label, loss in losses.items():
            yield f"validation loss, {label}", _loss(loss), f"{step:,}"
    if "val_loss" in measured:
        yield "validation loss", _loss(measured["val_loss"].value), f"{measured['val_loss'].step:,}"
    for name, what in (("hellaswag_acc", "HellaSwag, acc"), ("hellaswag_acc_norm", "HellaSwag, acc_norm")):
        if name in measured:
            yield what, f"{measured[name].value:.2%}", f"{measured[name].step:,}"


def _loss(loss: float | None) -> str:
    """In nats a token."""
    return "not finite" if loss is None else f"{loss:.4f} (perplexity {math.exp(min(loss, 700.0)):,.2f})"


def _data_rows(facts: RunFacts) -> Iterator[Row]:
    data, manifest = facts.spec.data, facts.data
    sources = (*data.sources, *data.validation_sources)
    shares = _shares(facts)
    for index, (label, source) in enumerate(zip(source_labels(data), sources, strict=True)):
        is_trained_on = index < len(data.sources)
        stream = manifest.source(label).streams.get("train" if is_trained_on else "validation") if manifest else None
        yield (
            label,
            source.kind,
            (f"{shares[label]:.1%}" if label in shares else "") if is_trained_on else "validation only",
            f"{stream.documents:,}" if stream else "",
            f"{stream.tokens:,}" if stream else "",
        )


def _shares(facts: RunFacts) -> dict[str, float]:
    """Of each source in what was trained on, by label; empty where only the tokens, which are not here, would tell."""
    data = facts.spec.data
    if facts.data is not None:
        given = mix_shares(data, facts.data)
    else:
        weights = dict(zip(source_labels(data), (source.weight for source in data.sources), strict=False))
        given = {label: weight for label, weight in weights.items() if weight is not None}
    total = sum(given.values())
    return {label: share / total for label, share in given.items()} if total else {}


def _tokenizer(facts: RunFacts) -> str:
    tokenizer = facts.spec.tokenizer
    if isinstance(tokenizer, PretrainedTokenizer):
        what = f"`{_last_part(tokenizer.name)}`, which existed before"
    else:
        what = f"{tokenizer.kind}, trained on the same text"
    return f"Tokenizer: {what}; {facts.spec.vocab_size:,} tokens."


def _version_rows(passport: Mapping[str, Any]) -> Iterator[Row]:
    versions = {name: passport.get(name) for name in ("dsllm", "python")} | dict(passport.get("packages", {}))
    for name, version in versions.items():
        if version is not None:
            yield name, str(version)


def _reproduction(facts: RunFacts) -> str:
    hashes = {what: facts.passport.get(f"{what}_hash") for what in ("data", "tokenizer")}
    known = ", ".join(f"{what} `{digest[:12]}`" for what, digest in hashes.items() if digest)
    return (
        "## Reproduce\n\n"
        "With this as `spec.yaml`, and the text where it says (absolute paths are cut to their last part):\n\n"
        "```bash\ndsllm launch spec.yaml\n```\n\n"
        f"Any number of GPUs takes the same steps.{f' SHA-256 of the prepared {known}.' if known else ''}\n\n"
        f"{_fenced('yaml', public_spec(facts.spec))}"
    )


def public_spec(spec: Spec) -> str:
    """YAML of the spec, its absolute paths, which say more of a machine than of the run, cut to their last part."""
    return dump_yaml(_without_folders(spec.model_dump(mode="json")))


def _without_folders(node: Any, key: str = "") -> Any:
    if isinstance(node, dict):
        return {name: _without_folders(child, name) for name, child in node.items()}
    if isinstance(node, list):
        return [_without_folders(child) for child in node]
    return _last_part(node) if key in PATH_KEYS and isinstance(node, str) else node


def _last_part(name: str) -> str:
    return Path(name).name if name.startswith(("/", "~")) else name


def _table(title: str, columns: Sequence[str], rows: Iterable[Row]) -> str:
    """Markdown; empty without rows."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [columns, *rows]]
    if len(lines) == 1:
        return ""
    return f"## {title}\n\n" + "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def _fenced(language: str, text: str) -> str:
    """A block of code, between fences that are longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
