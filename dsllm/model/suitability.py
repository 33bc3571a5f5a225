"""Whether a model type that dsllm has no family for can be trained as it is."""

from __future__ import annotations

import functools
import json
import re

import torch
from torch.nn import functional
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dsllm.errors import UserError
from dsllm.model.document_mask import document_mask, sliding_window
from dsllm.model.families import CONFIGS, GROUPED_EXPERTS
from dsllm.model.narrow import UNFIT, narrow_model

HEAD_SCALE = 1000.0
"""The head's weights are enlarged by so much, that a cap on the logits shows."""
TOLERANCE = 1e-3
"""Of the largest logit."""
PROBE = tuple(range(1, 17))


def check_suitable(config: PretrainedConfig, zero_stage: int, masks_documents: bool) -> None:
    """Raises UserError for a type that does something to its logits, has weights that no rule here draws or experts
    that differ from rank to rank, no blocks, or documents that see each other through a mask.

    Looked at on a small model of the type, on the CPU.
    """
    model, kind = narrow_model(config), f"model.config: model type {config.model_type}"
    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        raise UserError(f"{kind} has no blocks that transformers knows; choose another model type")
    _check_logits(model, kind)
    drawn = [name for name, value in own_vectors(config).items() if value is None]
    if drawn:
        raise UserError(f"{kind} draws {drawn[0]} in a way of its own, which dsllm has not; choose another model type")
    if masks_documents:
        _check_alike(config, kind)
        _check_mask(model, kind)
    has_experts = any(".experts." in name for name, _ in model.named_parameters())
    if zero_stage == 3 and has_experts and model.config._experts_implementation != GROUPED_EXPERTS:
        raise UserError(
            f"{kind} at zero.stage 3: its experts are computed one by one as tokens choose them, and ranks would wait "
            "for each other for ever; set zero.stage to 2 or less"
        )


def _check_alike(config: PretrainedConfig, kind: str) -> None:
    """One mask serves all layers."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if len(kinds) > 1:
        raise UserError(
            f"{kind} with data.mask_documents: it has layers of several kinds ({', '.join(kinds)}), and one mask of "
            "documents serves all; set data.mask_documents to false, or choose a model type with one kind"
        )


@torch.no_grad()
def _check_mask(model: PreTrainedModel, kind: str) -> None:
    """What comes of a document is the same alone and behind another one."""
    ids, length = torch.tensor([PROBE]), len(PROBE) // 2
    positions = torch.arange(len(PROBE)).remainder(length)[None]
    mask = document_mask(positions, torch.float32, sliding_window(model.config))
    alone = model.base_model(input_ids=ids[:, length:], use_cache=False)[0]
    try:
        packed = model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)[0]
        is_kept = (packed[:, length:] - alone).abs().max() <= TOLERANCE * alone.abs().max()
    except UNFIT:
        is_kept = False
    if not is_kept:
        raise UserError(
            f"{kind} with data.mask_documents: its attention takes no mask of documents; set data.mask_documents to "
            "false, or choose another model type"
        )


def own_vectors(config: PretrainedConfig) -> dict[str, float | None]:
    """What transformers itself fills each vector of the type with, by its name with `*` for the block's number; None
    where that is no single value."""
    return _own_vectors(config.model_type, json.dumps(config.to_dict(), sort_keys=True, default=str))


def without_number(name: str) -> str:
    """`model.layers.3.norm.weight` -> `model.layers.*.norm.weight`."""
    return re.sub(r"\.\d+\.", ".*.", name)


def is_own_family(config: PretrainedConfig) -> bool:
    """Whether the model type is one that a spec can spell out."""
    return config.model_type in CONFIGS


@functools.lru_cache
def _own_vectors(model_type: str, keys: str) -> dict[str, float | None]:
    model = narrow_model(CONFIG_MAPPING[model_type].from_dict(json.loads(keys)))
    vectors: dict[str, float | None] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            is_one_value = bool((parameter == parameter.flatten()[0]).all())
            vectors[without_number(name)] = parameter.flatten()[0].item() if is_one_value else None
    return vectors


@torch.no_grad()
def _check_logits(model: PreTrainedModel, kind: str) -> None:
    """The loss head takes the last hidden state times the projection, and nothing besides."""
    head, ids = model.get_output_embeddings(), torch.tensor([PROBE])
    if head is None or getattr(head, "bias", None) is not None:
        raise UserError(
            f"{kind} has no output projection, or one with a bias, which no loss here has; choose another model type"
        )
    head.weight.mul_(HEAD_SCALE)
    expected = model(input_ids=ids).logits
    found = functional.linear(model.base_model(input_ids=ids, use_cache=False)[0], head.weight)
    if not (expected - found).abs().max() <= TOLERANCE * expected.abs().max():
        raise UserError(
            f"{kind} scales or caps its logits, for which no loss is here; choose another model type, or a config "
            "without that"
        )
