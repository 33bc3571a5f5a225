"""Rules between the fields and sections of a spec, each with what was given, the rule and the remedy.

A rule is a generator of sentences whose parameter names are the sections that it reads, so that it can run as soon as
those sections are valid, whatever is wrong with the others. What DeepSpeed would refuse hours later, or silently
ignore, is refused here; the DeepSpeed sources named below are those of 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dsllm.errors import UserError
from dsllm.spec.config_keys import wrong_keys
from dsllm.spec.derived import (
    PRETRAINED_VOCAB_SIZES,
    max_positions,
    source_labels,
    tokenizer_vocab_size,
    train_steps,
    vocab_size,
    written_config,
)
from dsllm.spec.layers import layer_numbers, parse_layers
from dsllm.spec.sizes import sizes_of

if TYPE_CHECKING:
    from dsllm.spec.sections import (
        AnyModel,
        Batch,
        Data,
        Launch,
        Optimizer,
        Schedule,
        Section,
        Tokenizer,
        Training,
        Zero,
    )

Rule = Callable[..., Iterator[str]]

_RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Registers a generator of sentences; the order in this file is the order of the messages."""
    _RULES.append(function)
    return function


def broken_rules(sections: Mapping[str, object]) -> list[str]:
    """Every sentence of the rules that can run on these valid sections, keyed by their names in the spec."""
    problems: list[str] = []
    for check in _RULES:
        names = check.__code__.co_varnames[: check.__code__.co_argcount]
        if all(name in sections for name in names):
            problems.extend(check(*(sections[name] for name in names)))
    return problems


def _differs_from_default(section: Section, field: str) -> bool:
    """Whether the field says something. Its mere presence does not: a resolved spec writes out every default."""
    default: Any = type(section).model_fields[field].default
    return bool(getattr(section, field) != default)


# --- the network ------------------------------------------------------------------------------------------------------


@rule
def written_config_has_sizes(model: AnyModel) -> Iterator[str]:
    if model.family == "auto":
        yield from wrong_keys(written_config(model))


@rule
def heads_divide_the_width(model: AnyModel) -> Iterator[str]:
    sizes = sizes_of(model)
    if sizes is None or (sizes.head_size is not None and "head_size" in FAMILY_FIELDS[sizes.family]):
        return
    width, heads, names = sizes.hidden_size, sizes.num_attention_heads, sizes.names
    if width % heads:
        yield (
            f"{sizes.given('num_attention_heads')} with {names['hidden_size']} {width}; the heads must divide the "
            f"width; try {names['num_attention_heads']} {_nearest_divisor(width, heads)}, or "
            f"{names['hidden_size']} {_nearest_multiple(width, heads)}"
        )
    elif sizes.family != "gpt2" and (width // heads) % 2:
        yield (
            f"{sizes.given('num_attention_heads')} with {names['hidden_size']} {width}, which is {width // heads} a "
            "head; rotary positions need an even number; change either"
        )


@rule
def head_size_is_even(model: AnyModel) -> Iterator[str]:
    sizes = sizes_of(model)
    if sizes is None or sizes.head_size is None or "head_size" not in FAMILY_FIELDS[sizes.family]:
        return
    if sizes.head_size % 2:
        yield f"{sizes.given('head_size')}; rotary positions need an even number; try {sizes.head_size + 1}"


@rule
def key_value_heads_divide_the_heads(model: AnyModel) -> Iterator[str]:
    sizes = sizes_of(model)
    if sizes is None or sizes.family == "gpt2":
        return
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    if groups is not None and heads % groups:
        yield (
            f"{sizes.given('num_key_value_heads')} with {sizes.names['num_attention_heads']} {heads}; the former must "
            f"divide the latter; try {_nearest_divisor(heads, groups)}"
        )


_ROTARY = ("num_key_value_heads", "rope_theta")
_EXPERTS = ("num_experts", "num_experts_per_token", "balance_loss_weight")

FAMILY_FIELDS: dict[str, tuple[str, ...]] = {
    "gpt2": ("dropout",),
    "llama": (*_ROTARY, "head_size"),
    "mistral": (*_ROTARY, "head_size", "sliding_window"),
    "qwen2": _ROTARY,
    "qwen3": (*_ROTARY, "head_size"),
    "mixtral": (*_ROTARY, "head_size", "sliding_window", *_EXPERTS),
}
"""Of the fields that not every family has, those of each."""


@rule
def fields_belong_to_the_family(model: AnyModel) -> Iterator[str]:
    if model.family == "auto":
        return
    special = dict.fromkeys(field for fields in FAMILY_FIELDS.values() for field in fields)
    for field in special:
        if field not in FAMILY_FIELDS[model.family] and _differs_from_default(model, field):
            yield (
                f"model.{field}: given {getattr(model, field)} with family {model.family}, which has no such thing; "
                f"remove it, or choose another family"
            )


@rule
def automatic_model_has_a_config(model: AnyModel) -> Iterator[str]:
    if model.family != "auto":
        return
    if model.config is None and model.init.kind == "scratch":
        yield (
            "model.config: missing, and model.init is scratch, which has none; give a folder that has a config.json, a "
            "name on the Hub, or the keys themselves"
        )
    elif isinstance(model.config, dict) and not isinstance(model.config.get("model_type"), str):
        yield (
            "model.config.model_type: missing; it says which of transformers' models the other keys describe; give it, "
            "for example llama"
        )


@rule
def experts_are_enough_to_choose_among(model: AnyModel) -> Iterator[str]:
    sizes = sizes_of(model)
    if sizes is None or sizes.family != "mixtral":
        return
    num_experts, chosen, name = sizes.num_experts, sizes.num_experts_per_token, sizes.names["num_experts"]
    if chosen > num_experts:
        yield (
            f"{sizes.given('num_experts_per_token')} with {name} {num_experts}; a token cannot take more experts than "
            f"there are; lower it to {num_experts} or less, or raise {name}"
        )
    elif chosen == 1:
        # transformers scales the chosen experts' weights to a sum of 1: a single one's is 1 whatever the router finds
        yield (
            f"{sizes.given('num_experts_per_token')}; the chosen experts share a weight of 1, and the router of a "
            "single one would learn nothing; give 2 or more"
        )


@rule
def experts_have_aligned_rows(model: AnyModel, training: Training) -> Iterator[str]:
    # torch's grouped_mm, which multiplies all experts at once: "strides should be multiple of 16 bytes"
    sizes = sizes_of(model)
    if sizes is None or sizes.family != "mixtral":
        return
    multiple = 4 if training.precision == "fp32" else 8
    for field in ("hidden_size", "intermediate_size"):
        width = getattr(sizes, field)
        if width is not None and width % multiple:
            yield (
                f"{sizes.given(field)} with precision {training.precision}; experts are multiplied together, for which "
                f"it must be a multiple of {multiple}; try {_nearest_multiple(width, multiple)}"
            )


@rule
def model_holds_the_vocabulary(model: AnyModel, tokenizer: Tokenizer) -> Iterator[str]:
    size = tokenizer_vocab_size(tokenizer)
    is_still_to_read = model.family == "auto" and not isinstance(model.config, dict)
    if vocab_size(model, tokenizer) is None and not is_still_to_read:
        known = ", ".join(sorted(PRETRAINED_VOCAB_SIZES))
        yield (
            f"model.vocab_size: missing, and the size of this pretrained tokenizer is only known from its files (known "
            f"without: {known}); set model.vocab_size to its number of tokens"
        )
    elif model.vocab_size is not None and size is not None and model.vocab_size < size:
        yield (
            f"model.vocab_size: given {model.vocab_size}; the tokenizer has {size} tokens and the model must know them "
            f"all; set it to {size} or more, or remove it"
        )


@rule
def listed_layers_are_the_models(model: AnyModel) -> Iterator[str]:
    layers = model.init.layers if model.init.kind == "pretrained" else None
    if layers is None:
        return
    try:
        count = len(layer_numbers(parse_layers(layers, "model.init.layers")))
    except UserError as error:
        yield str(error)
        return
    if model.family != "auto" and model.num_layers != count:
        yield (
            f"model.num_layers: given {model.num_layers}; model.init.layers lists {count} layers, '{layers}'; set "
            f"model.num_layers to {count}, or list others"
        )


# --- the data ---------------------------------------------------------------------------------------------------------


@rule
def weights_make_a_mix(data: Data) -> Iterator[str]:
    weights = [source.weight for source in data.sources]
    missing = [index for index, weight in enumerate(weights) if weight is None]
    if 0 < len(missing) < len(weights):
        yield (
            f"data.sources[{missing[0]}].weight: missing, but other sources have one; a mix needs the weight of each; "
            f"give it, or remove all weights to mix by size"
        )
    elif not missing and sum(weight or 0 for weight in weights) == 0:
        yield "data.sources: given weights that are all 0; a run needs something to train on; raise one of them"
    for index, source in enumerate(data.validation_sources):
        if source.weight is not None:
            yield (
                f"data.validation_sources[{index}].weight: given {source.weight:g}; validation sources are not mixed, "
                f"each is reported by itself; remove it"
            )


@rule
def labels_are_unlike(data: Data) -> Iterator[str]:
    labels = source_labels(data)
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        yield f"data.sources: given the label {label!r} twice; reports and files are named by it; change one"


@rule
def something_is_validated_on(data: Data) -> Iterator[str]:
    if data.validation_fraction == 0 and not data.validation_sources:
        yield (
            "data.validation_fraction: given 0 without data.validation_sources; a run needs text to validate on; "
            "set it to 0.0005 or so, or name a source of its own"
        )


# --- the batch --------------------------------------------------------------------------------------------------------


@rule
def sequence_fits_the_positions(model: AnyModel, batch: Batch) -> Iterator[str]:
    limit = max_positions(model)
    if limit is not None and batch.sequence_length > limit:
        yield (
            f"batch.sequence_length: given {batch.sequence_length}; the model reads at most "
            f"model.max_position_embeddings = {limit}; shorten the one or raise the other"
        )


@rule
def micro_batch_divides_the_batch(batch: Batch) -> Iterator[str]:
    micro, whole = batch.micro_batch_size, batch.global_batch_size
    if micro == "auto":
        return
    if micro > whole:
        yield (
            f"batch.micro_batch_size: given {micro}; it cannot exceed global_batch_size = {whole}; "
            f"set it to {whole} or a divisor of it"
        )
    elif whole % micro:
        yield (
            f"batch.micro_batch_size: given {micro}; it must divide global_batch_size = {whole}; "
            f"try micro_batch_size {_nearest_divisor(whole, micro)}, or "
            f"global_batch_size {_nearest_multiple(whole, micro)}"
        )


# --- the run ----------------------------------------------------------------------------------------------------------


@rule
def run_has_an_end(training: Training) -> Iterator[str]:
    if training.tokens is None and training.train_steps is None:
        yield "training: neither tokens nor train_steps is given; one of them must end the run; set training.tokens"


@rule
def schedule_fits_the_run(schedule: Schedule, batch: Batch, training: Training) -> Iterator[str]:
    if training.tokens is None and training.train_steps is None:
        return
    steps = train_steps(training, batch.global_batch_size * batch.sequence_length)
    if schedule.warmup_steps > steps:
        yield (
            f"schedule.warmup_steps: given {schedule.warmup_steps}; the whole run has {steps} steps; "
            f"lower it, or lengthen the run"
        )
    elif schedule.name == "wsd" and schedule.warmup_steps + schedule.decay_fraction * steps > steps:
        yield (
            f"schedule.decay_fraction: given {schedule.decay_fraction:g} after {schedule.warmup_steps} steps of "
            f"warm-up; the two must fit in the run's {steps} steps; lower either"
        )


@rule
def schedule_fields_belong_to_its_shape(schedule: Schedule) -> Iterator[str]:
    if schedule.name != "wsd" and _differs_from_default(schedule, "decay_fraction"):
        yield (
            f"schedule.decay_fraction: given {schedule.decay_fraction:g} with schedule {schedule.name}; only wsd has a "
            f"decay phase; remove it, or set schedule.name to wsd"
        )
    if schedule.name == "constant" and _differs_from_default(schedule, "min_learning_rate_ratio"):
        yield (
            f"schedule.min_learning_rate_ratio: given {schedule.min_learning_rate_ratio:g} with schedule constant, "
            f"which never falls; remove it, or choose another schedule"
        )


# --- precision --------------------------------------------------------------------------------------------------------


@rule
def loss_scale_is_for_fp16(training: Training) -> Iterator[str]:
    if training.loss_scale and training.precision != "fp16":
        yield (
            f"training.loss_scale: given {training.loss_scale:g} with precision {training.precision}; only fp16 scales "
            f"its loss; remove it, or set training.precision to fp16"
        )


@rule
def gradients_add_up_in_a_type_that_exists(training: Training, zero: Zero) -> Iterator[str]:
    given, precision = training.gradient_accumulation_precision, training.precision
    if given == "auto" or given == precision:
        return
    if given != "fp32":
        yield (
            f"training.gradient_accumulation_precision: given {given} with precision {precision}; gradients add up in "
            f"fp32 or in the precision of the weights; set it to auto"
        )
    elif zero.stage == 0:
        # runtime/engine.py, _do_optimizer_sanity_check: NotImplementedError, "unsupported mix"
        yield (
            f"training.gradient_accumulation_precision: given fp32 with precision {precision} at zero.stage 0, where "
            f"DeepSpeed cannot; set it to auto or {precision}, or zero.stage to 1 or more"
        )


# --- the optimizer ----------------------------------------------------------------------------------------------------


@rule
def muon_fields_belong_to_muon(optimizer: Optimizer) -> Iterator[str]:
    for field in ("muon_learning_rate", "muon_momentum"):
        if optimizer.name != "muon" and _differs_from_default(optimizer, field):
            yield (
                f"optimizer.{field}: given {getattr(optimizer, field):g} with optimizer {optimizer.name}; only muon "
                f"has it; remove it, or set optimizer.name to muon"
            )


@rule
def muon_stays_off_nvme(optimizer: Optimizer, zero: Zero) -> Iterator[str]:
    # DeepSpeed's swapper knows what Adam keeps of a parameter, and makes its files and buffers for that.
    if optimizer.name == "muon" and zero.offload_optimizer == "nvme":
        yield (
            "optimizer.name: given muon with zero.offload_optimizer nvme, where its momentum has no place; set "
            "zero.offload_optimizer to cpu or none, or optimizer.name to adamw"
        )


@rule
def host_steps_by_deepspeeds_adam(optimizer: Optimizer, zero: Zero) -> Iterator[str]:
    if optimizer.name == "adamw" and not optimizer.fused and zero.offload_optimizer != "none":
        yield (
            f"optimizer.fused: given false with zero.offload_optimizer {zero.offload_optimizer}, where DeepSpeed's own "
            f"CPUAdam steps; remove it, or set zero.offload_optimizer to none"
        )


# --- kernels ----------------------------------------------------------------------------------------------------------


@rule
def family_has_liger_kernels(model: AnyModel, training: Training) -> Iterator[str]:
    if training.kernels == "liger" and model.family == "gpt2":
        yield (
            "training.kernels: given liger with family gpt2, for which liger-kernel has none; set it to auto or torch"
        )


@rule
def blocks_are_fused_once(training: Training) -> Iterator[str]:
    if training.kernels == "liger" and training.compile:
        yield (
            "training.kernels: given liger with training.compile true, which fuses the same operations; set "
            "training.kernels to auto, or training.compile to false"
        )


# --- ZeRO -------------------------------------------------------------------------------------------------------------

_LOWEST_STAGE = {
    ("offload_optimizer", "cpu"): 1,
    # stages 1 and 2 would quietly use the CPU: runtime/zero/stage_1_and_2.py asks only for "not none"
    ("offload_optimizer", "nvme"): 3,
    # stages 0 to 2 never read the block: runtime/engine.py hands it to stage 3 alone
    ("offload_param", "cpu"): 3,
    ("offload_param", "nvme"): 3,
}


@rule
def offload_needs_its_stage(zero: Zero) -> Iterator[str]:
    for (field, device), lowest in _LOWEST_STAGE.items():
        if getattr(zero, field) == device and zero.stage < lowest:
            need = "needs zero.stage 3" if lowest == 3 else f"needs zero.stage {lowest} or more"
            yield (
                f"zero.{field}: given {device} at zero.stage {zero.stage}; it {need}; "
                f"raise zero.stage, or set zero.{field} to none"
            )


@rule
def nvme_has_a_path(zero: Zero) -> Iterator[str]:
    fields = [field for field in ("offload_optimizer", "offload_param") if getattr(zero, field) == "nvme"]
    if fields and zero.nvme_path is None:
        yield f"zero.nvme_path: missing; zero.{fields[0]} is nvme; name a folder on the NVMe drive"
    if zero.nvme_path is not None and not fields:
        yield (
            f"zero.nvme_path: given '{zero.nvme_path}', but nothing is offloaded to nvme; remove it, or set "
            f"zero.offload_optimizer or zero.offload_param to nvme"
        )


_FIELD_STAGES = {
    "reduce_bucket_elements": (1, 2, 3),
    "gather_bucket_elements": (1, 2, 3),
    "persistence_threshold_elements": (3,),
    "max_live_elements": (3,),
}
"""Stages at which DeepSpeed reads each field at all."""


@rule
def fields_belong_to_the_stage(zero: Zero) -> Iterator[str]:
    for field, stages in _FIELD_STAGES.items():
        if zero.stage not in stages and _differs_from_default(zero, field):
            needed = "3" if stages == (3,) else f"{stages[0]} or more"
            yield (
                f"zero.{field}: given {getattr(zero, field)} at zero.stage {zero.stage}, which ignores it; "
                f"remove it, or set zero.stage to {needed}"
            )
    if zero.stage == 0 and zero.overlap_comm is True:
        yield "zero.overlap_comm: given true at zero.stage 0, which ignores it; remove it, or raise zero.stage"


@rule
def reduction_is_tunable(zero: Zero, training: Training) -> Iterator[str]:
    # Stage 1 in bf16 with fp32 accumulation runs BF16_Optimizer, whose gradients runtime/engine.py reduces by itself,
    # in buckets of a fixed size and after backward.
    fp32_gradients = training.gradient_accumulation_precision in ("auto", "fp32")
    if not (zero.stage == 1 and training.precision == "bf16" and fp32_gradients and zero.offload_optimizer == "none"):
        return
    given = {"overlap_comm: given true": zero.overlap_comm is True}
    given[f"reduce_bucket_elements: given {zero.reduce_bucket_elements}"] = zero.reduce_bucket_elements is not None
    for field in (text for text, is_given in given.items() if is_given):
        yield (
            f"zero.{field} at zero.stage 1 with bf16 weights and fp32 accumulation, where DeepSpeed ignores it; "
            f"remove it, or set zero.stage to 2, or training.gradient_accumulation_precision to bf16"
        )


@rule
def gather_bucket_is_even(zero: Zero) -> Iterator[str]:
    # runtime/zero/stage_1_and_2.py asserts the alignment of two 16-bit elements.
    elements = zero.gather_bucket_elements
    if zero.stage in (1, 2) and elements is not None and elements % 2:
        yield f"zero.gather_bucket_elements: given {elements}; DeepSpeed wants an even number; use {elements + 1}"


# --- the launch -------------------------------------------------------------------------------------------------------


@rule
def environment_holds_names(launch: Launch) -> Iterator[str]:
    for index, entry in enumerate(launch.environment):
        name, separator, _ = entry.partition("=")
        if separator:  # what follows it may be a key, and is not repeated
            yield (
                f"launch.environment.{index}: given {name}=…; names only, never values: a spec is kept with its run; "
                f"set the variable where you start the run, and give {name or 'its name'}"
            )
        elif not _VARIABLES.fullmatch(entry):
            yield (
                f"launch.environment.{index}: given '{entry}'; a variable's name, or a pattern with * and ? such as "
                f"AWS_*; must hold only letters, digits, _, * and ?, and not begin with a digit"
            )


_VARIABLES = re.compile(r"[A-Za-z_*?][A-Za-z0-9_*?]*")


# --- numbers for the remedies -----------------------------------------------------------------------------------------


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the smaller one of two."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


def _nearest_multiple(number: int, factor: int) -> int:
    """The positive multiple of `factor` nearest to `number`."""
    return max(1, round(number / factor)) * factor
