"""The bytes that any Hugging Face causal language model holds, by running it on tensors that hold nothing.

One forward and one backward pass of the real model under torch's FakeTensorMode: every operation works out the shapes
of its results, and none is computed or allocated. What is alive follows from the storages' births and deaths.

The fake tensors are always on the CPU, since a torch without CUDA cannot differentiate fake CUDA ones and an answer
should not depend on the machine. For a CUDA device the kernels that differ there are put in their place.
"""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    masking_utils,
)
from transformers.integrations import moe
from transformers.modeling_layers import GradientCheckpointingLayer

from dsllm.errors import UserError, first_line
from dsllm.model.build import DTYPES, build_model, enable_activation_checkpointing
from dsllm.model.configs import check_is_causal, num_experts
from dsllm.model.cuda_kernels import cuda_kernels
from dsllm.model.ledger import Ledger
from dsllm.model.loss import TrainingModel
from dsllm.model.replaced import replaced
from dsllm.plan.activations import Activations
from dsllm.plan.model_shape import ModelShape, Tensor
from dsllm.plan.workload import CHECKPOINTED_BLOCKS, Device, Workload
from dsllm.spec.config_keys import DEFAULTS

ACTIVATION_SLACK = 1.4
"""Of a type that no formula knows: OLMo 2 keeps 1.37 times what a Llama of its sizes does."""
DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


@dataclass(frozen=True, kw_only=True)
class TracedShape(ModelShape):
    """The sizes of a model of any type, counted on the built model instead of by the formulas of our families.

    What is not counted, FLOPs beside the parameters and traffic, is that of the nearer style.
    """

    traced_tensors: tuple[Tensor, ...]
    """Every parameter once, in the order of the modules."""
    embedding_elements: int
    """Of the token embedding."""
    block_elements: int
    """Of the largest block."""
    expert_elements: int
    """Of all experts of all blocks."""

    @property
    def activation_slack(self) -> float:
        return 1.0 if self.family in DEFAULTS else ACTIVATION_SLACK

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.traced_tensors

    @property
    def parameters(self) -> int:
        vocabulary_matrices = 1 if self.tie_word_embeddings else 2
        padding = (self.padded_vocab_size - self.vocab_size) * self.embedding_elements // self.padded_vocab_size
        return self.allocated_parameters - vocabulary_matrices * padding

    @property
    def active_parameters(self) -> int:
        passed_over = self.num_experts - self.num_experts_per_token
        return self.parameters - (self.expert_elements * passed_over // self.num_experts if passed_over else 0)

    @property
    def allocated_parameters(self) -> int:
        return sum(tensor.elements for tensor in self.traced_tensors)

    @property
    def embedding_parameters(self) -> int:
        return self.embedding_elements

    @property
    def parameters_per_layer(self) -> int:
        return self.block_elements


@dataclass(frozen=True)
class Trace:
    """What one micro-batch on one rank without ZeRO holds."""

    shape: TracedShape
    activations: Activations
    forward_peak_bytes: int
    """Weights and activations, the loss included, at most."""
    backward_peak_bytes: int
    """Weights, gradients and activations, at most."""


def trace(config: PretrainedConfig, run: Workload, micro_batch_size: int, device: Device) -> Trace:
    """Run the model of `config` once, forward and backward, on tensors that take no memory.

    Of `run` it takes precision, sequence length, checkpointing, attention, the masking of documents and loss; dropout
    is the config's. Bytes are those of `device`: on "cuda", of an Ampere GPU or a later one, in multiples of 512.
    Raises UserError for a model that cannot run so.
    """
    if run.loss == "fused":
        raise UserError("training.loss: given fused, whose kernels cannot be traced; trace with chunked or plain")
    check_is_causal(config, config.model_type)
    try:
        return _trace(_prepared(config, run), run, micro_batch_size, device)
    except DATA_DEPENDENT as error:
        raise UserError(
            f"model type {config.model_type}: it decides by the values of tensors, and a trace has none "
            f"({type(error).__name__}); give a model whose work is the same for every token"
        ) from error


def traced_shape(config: PretrainedConfig, vocab_size: int | None = None) -> TracedShape:
    """The sizes of the model of `config`, built without memory; `vocab_size` is how many of its rows are tokens, all
    when absent. Raises UserError for what is no causal model."""
    check_is_causal(config, config.model_type)
    with FakeTensorMode():
        return _shape(build_model(copy.deepcopy(config), torch.bfloat16), vocab_size)


def config_of(path: str | Path) -> PretrainedConfig:
    """The configuration in a model's folder, or in its config.json; nothing is downloaded.

    Raises UserError where there is none, or none of a causal language model that transformers knows.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{path}: no config.json there; give a Hugging Face model's folder, or its config.json")
    try:
        config = AutoConfig.from_pretrained(str(file), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not a config that this transformers can read ({first_line(error)}); check its model_type"
        ) from error
    check_is_causal(config, str(file))
    return config


def differences(arithmetic: Any, traced: Any) -> dict[str, float]:
    """How much more the arithmetic says than the trace, for each field of two equal dataclasses: 0.03 is 3 % more."""
    found = asdict(traced)
    return {term: _difference(value, found[term]) for term, value in asdict(arithmetic).items()}


def _difference(value: int, found: int) -> float:
    if found == 0:
        return 0.0 if value == 0 else math.inf
    return value / found - 1


def _prepared(config: PretrainedConfig, run: Workload) -> PretrainedConfig:
    """With the attention that the run asks for, or the plain one where the model type has no other."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config = copy.deepcopy(config)
    config._attn_implementation = run.attention if model_class._supports_sdpa else "eager"
    return config


def _trace(config: PretrainedConfig, run: Workload, micro_batch_size: int, device: Device) -> Trace:
    ledger = Ledger(device)
    with FakeTensorMode(), _sequences_unpacked(), _experts_in_any_type():
        causal_lm = build_model(config, DTYPES[run.precision])
        shape = _shape(causal_lm)
        if run.activation_checkpointing != "none":
            enable_activation_checkpointing(causal_lm, CHECKPOINTED_BLOCKS[run.activation_checkpointing])
        _drop_head_bias(causal_lm)
        model = TrainingModel(causal_lm, run.loss).train()
        ids = torch.zeros(micro_batch_size, run.sequence_length, dtype=torch.long)
        moments = _mark(model, ledger)
        with ledger, cuda_kernels() if device == "cuda" else contextlib.nullcontext():
            states = ledger.add([*model.parameters(), *model.buffers()])
            ledger.add([ids])
            loss = model(ids, torch.zeros_like(ids), torch.zeros_like(ids) if run.masks_documents else None)
            moments["backward"] = ledger.moment()
            loss.backward()
            moments["end"] = ledger.moment()
            gradients = ledger.add(weight.grad for weight in model.parameters() if weight.grad is not None)
    moments.setdefault("blocks_end", moments["end"])
    return Trace(
        shape=shape,
        activations=_activations(ledger, moments, states, ledger.with_summands(gradients)),
        forward_peak_bytes=ledger.peak_bytes(0, moments["backward"]),
        backward_peak_bytes=ledger.peak_bytes(moments["backward"], moments["end"]),
    )


def _mark(model: TrainingModel, ledger: Ledger) -> dict[str, int]:
    """Have the model note when forward reaches the loss, and backward the last block, the first one and its end."""
    moments: dict[str, int] = {}

    def note_gradient(tensor: torch.Tensor, name: str) -> None:
        """Note the moment at which backward has the gradient of `tensor`."""
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(lambda _: moments.setdefault(name, ledger.moment()) and None)

    def on_loss(head: nn.Module, args: tuple[Any, ...]) -> None:
        moments["loss"] = ledger.moment()
        moments["hidden"] = ledger.add(args[:1]).pop()

    def on_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if "backward" in moments:
            return  # the block is computed again
        if block is blocks[0]:
            note_gradient(out[0] if isinstance(out, tuple) else out, "first_block")
            note_gradient(args[0] if args else kwargs["hidden_states"], "blocks_end")
        if block is blocks[-1]:
            note_gradient(out[0] if isinstance(out, tuple) else out, "last_block")

    blocks = _blocks(model)
    for block in {blocks[0], blocks[-1]}:
        block.register_forward_hook(on_block, with_kwargs=True)
    model.causal_lm.get_output_embeddings().register_forward_pre_hook(on_loss)
    return moments


def _activations(ledger: Ledger, moments: dict[str, int], states: set[int], gradients: set[int]) -> Activations:
    def peak(start: str, end: str, without: set[int]) -> int:
        return ledger.peak_bytes(moments[start], moments[end], without)

    # The hidden states that the loss is given are the loss's: it need not keep them.
    saved = ledger.held_bytes(moments["loss"], states | {moments["hidden"]})
    without = states | gradients
    return Activations(
        saved_bytes=saved,
        loss_forward_bytes=peak("loss", "backward", states) - saved,
        loss_backward_bytes=peak("backward", "last_block", states) - saved,
        block_backward_bytes=peak("last_block", "blocks_end", without) - saved,
        first_block_bytes=peak("first_block", "blocks_end", without),
    )


def _shape(model: PreTrainedModel, vocab_size: int | None = None) -> TracedShape:
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if head is None:
        raise UserError(
            f"{type(model).__name__}: it has no output projection to take a loss from; give another model type"
        )
    embedding = model.get_input_embeddings().weight
    heads, width = getattr(config, "num_attention_heads", 1), config.hidden_size
    return TracedShape(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or width // heads,
        intermediate_size=_intermediate_size(config),
        max_position_embeddings=getattr(config, "max_position_embeddings", 0),
        vocab_size=vocab_size or config.vocab_size,
        padded_vocab_size=embedding.shape[0],
        tie_word_embeddings=embedding is head.weight,
        num_experts=num_experts(config),
        num_experts_per_token=getattr(config, "num_experts_per_tok", 0) if num_experts(config) else 0,
        traced_tensors=tuple(Tensor.of(weight.shape) for weight in model.parameters()),
        embedding_elements=embedding.numel(),
        block_elements=max(sum(weight.numel() for weight in block.parameters()) for block in _blocks(model)),
        expert_elements=sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name),
    )


def _intermediate_size(config: PretrainedConfig) -> int:
    """Of one expert where there are some, by whichever name the type has."""
    names = ("moe_intermediate_size",) if num_experts(config) else ()
    sizes = (getattr(config, name, None) for name in (*names, "intermediate_size", "ffn_dim", "n_inner"))
    return next((size for size in sizes if isinstance(size, int)), 4 * config.hidden_size)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Raises UserError for a model that has none."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UserError(f"{type(model).__name__}: it has no blocks that transformers knows; give another model type")
    return blocks


def _drop_head_bias(model: PreTrainedModel) -> None:
    """Phi's output projection has a bias, a number for each token of the vocabulary, which the loss head has not."""
    model.get_output_embeddings().register_parameter("bias", None)


def _sequences_unpacked() -> contextlib.AbstractContextManager[None]:
    """transformers reads the position ids to see whether sequences are packed, and where it cannot read them makes a
    mask that no run of ours has."""
    return replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


def _experts_in_any_type() -> contextlib.AbstractContextManager[None]:
    """torch's grouped product knows fake tensors in bf16 alone; transformers' own keeps the same for backward."""
    return replaced(moe, "_can_use_grouped_mm", lambda rows, weight, offsets: False)
