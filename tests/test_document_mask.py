"""With masks a packed document is as if it were alone; without, everything is as before."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, masking_utils

from dsllm.data.samples import IGNORED_LABEL
from dsllm.model.build import build_model, enable_activation_checkpointing, model_config
from dsllm.model.document_mask import document_mask
from dsllm.model.initialize import initialize_weights
from dsllm.model.loss import TrainingModel
from dsllm.spec.load import load_spec

LENGTH = 48
VOCAB_SIZE = 500
ROWS = [[20, 1, 17, 10], [48], [5, 43]]
"""Lengths of the documents in each sequence of a micro-batch."""

FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])
ATTENTIONS = pytest.mark.parametrize("attention", ["sdpa", "eager"])
CHECKPOINTING = pytest.mark.parametrize("every", [None, 1, 2])


@given(rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_a_token_sees_what_came_before_it_in_its_document_and_nothing_else(rows: list[list[int]]) -> None:
    length = max(sum(row) for row in rows)
    rows = [[*row, *([length - sum(row)] if length > sum(row) else [])] for row in rows]
    mask = document_mask(positions(rows), torch.float32)
    assert mask.shape == (len(rows), 1, length, length)
    for row, documents in enumerate(rows):
        document_of = [number for number, size in enumerate(documents) for _ in range(size)]
        for query, key in itertools.product(range(length), repeat=2):
            is_seen = key <= query and document_of[query] == document_of[key]
            assert mask[row, 0, query, key] == (0 if is_seen else -torch.inf)


@FAMILIES
def test_the_mask_is_that_which_transformers_finds_in_the_positions(family: str) -> None:
    found = masking_utils.create_causal_mask(
        config=small_model(family).config,
        inputs_embeds=torch.zeros(len(ROWS), LENGTH, 1),
        attention_mask=None,
        past_key_values=None,
        position_ids=positions(ROWS),
    )
    assert torch.equal(document_mask(positions(ROWS), torch.float32) == 0, found)


def test_rows_of_a_mask_lie_at_multiples_of_8_so_that_no_block_copies_it() -> None:
    mask = document_mask(positions([[3, 10]]), torch.bfloat16)
    assert mask.dtype == torch.bfloat16
    assert [stride % 8 for stride in mask.stride()] == [0, 0, 0, 1]


@FAMILIES
@ATTENTIONS
@CHECKPOINTING
def test_changing_a_neighbour_changes_no_bit_of_a_document(family: str, attention: str, every: int | None) -> None:
    ids, changed = random_ids(), random_ids()
    changed[0, 21:38] = (changed[0, 21:38] + 7) % VOCAB_SIZE  # the third document of the first sequence
    model = training_model(family, attention, every)
    before, after = (token_losses(model, inputs, positions(ROWS)) for inputs in (ids, changed))
    is_third = torch.zeros_like(ids, dtype=torch.bool)
    is_third[0, 21:38] = True
    assert torch.equal(before[~is_third], after[~is_third])
    assert not torch.isclose(before[is_third], after[is_third]).any()


@FAMILIES
def test_without_a_mask_a_neighbour_is_seen(family: str) -> None:
    ids, changed = random_ids(), random_ids()
    changed[0, 3] = (changed[0, 3] + 7) % VOCAB_SIZE
    model = training_model(family)
    before, after = (token_losses(model, inputs, None) for inputs in (ids, changed))
    assert not torch.equal(before[0, 20:], after[0, 20:])


@FAMILIES
@ATTENTIONS
@CHECKPOINTING
def test_packed_documents_have_the_loss_and_the_gradients_of_each_one_alone(
    family: str, attention: str, every: int | None
) -> None:
    ids, labels = random_ids(), random_ids(seed=1)
    packed = training_model(family, attention, every)
    loss = packed(ids, labels, positions(ROWS))
    loss.backward()

    alone = training_model(family, attention)
    total = torch.zeros(())
    for inputs, targets, lengths in zip(ids, labels, ROWS, strict=True):
        for document, target in zip(inputs.split(lengths), targets.split(lengths), strict=True):
            total = total + alone(document.unsqueeze(0), target.unsqueeze(0), None, torch.tensor(ids.numel()))
    total.backward()
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    for (name, ours), expected in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, atol=1e-5, rtol=1e-3, msg=name)


@FAMILIES
def test_padding_changes_neither_the_loss_nor_the_gradients(family: str) -> None:
    """A document of 30 tokens and 18 of padding, whatever stands in them."""
    ids, labels = random_ids()[:1], random_ids(seed=1)[:1]
    labels[:, 30:] = IGNORED_LABEL
    other = ids.clone()
    other[:, 30:] = 0
    outcomes = []
    for inputs, targets, position_ids in (
        (ids, labels, positions([[30, 18]])),
        (other, labels, positions([[30, 18]])),
        (ids[:, :30], labels[:, :30], None),
    ):
        model = training_model(family)
        loss = model(inputs, targets, position_ids)
        loss.backward()
        outcomes.append([loss.detach(), *(weight.grad for weight in model.parameters())])
    torch.testing.assert_close(outcomes[1], outcomes[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(outcomes[2], outcomes[0], atol=1e-5, rtol=1e-3)


def test_a_window_ends_within_a_document() -> None:
    mask = document_mask(positions([[3, 5]]), torch.float32, sliding_window=2)[0, 0]
    seen = [[key for key in range(8) if mask[query, key] == 0] for query in range(8)]
    assert seen == [[0], [0, 1], [1, 2], [3], [3, 4], [4, 5], [5, 6], [6, 7]]


def test_a_masked_document_has_the_window_that_an_unmasked_one_has() -> None:
    model = TrainingModel(small_model("mistral", more=", sliding_window: 8"), "chunked").eval()
    ids = random_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, position_ids=positions([[LENGTH]] * len(ROWS))), model(ids))


@FAMILIES
def test_bf16_takes_a_mask_too(family: str) -> None:
    model = training_model(family, dtype=torch.bfloat16)
    masked = model(random_ids(), random_ids(seed=1), positions(ROWS))
    exact = training_model(family)(random_ids(), random_ids(seed=1), positions(ROWS))
    assert torch.isfinite(masked)
    torch.testing.assert_close(masked, exact, atol=0.02, rtol=0)


@FAMILIES
def test_without_documents_to_mask_attention_gets_no_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def watch(*args: Any, attn_mask: Any = None, is_causal: bool = False, **kwargs: Any) -> torch.Tensor:
        seen.append((attn_mask is None, is_causal))
        return scaled_dot_product_attention(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    model = training_model(family)
    model(random_ids(), random_ids())
    assert seen == [(True, True)] * 3
    model(random_ids(), random_ids(), positions(ROWS))
    assert seen[3:] == [(False, False)] * 3


def positions(rows: list[list[int]]) -> torch.Tensor:
    """Position ids (rows, their length): each document counts from 0."""
    return torch.tensor([[place for size in row for place in range(size)] for row in rows])


def random_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (len(ROWS), LENGTH), generator=torch.Generator().manual_seed(seed))


def small_model(
    family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, more: str = ""
) -> PreTrainedModel:
    groups = ", num_key_value_heads: 2" if family == "llama" else ""
    spec = load_spec(
        "quickstart",
        [
            f"model={{family: {family}, num_layers: 3, hidden_size: 64, num_attention_heads: 4{groups}, "
            f"max_position_embeddings: {LENGTH}, attention: {attention}{more}}}",
            f"tokenizer={{kind: bpe, vocab_size: {VOCAB_SIZE}}}",
            f"batch.sequence_length={LENGTH}",
        ],
    )
    model = build_model(model_config(spec), dtype)
    initialize_weights(model, spec.seed)
    return model


def training_model(
    family: str, attention: str = "sdpa", every: int | None = None, dtype: torch.dtype = torch.float32
) -> TrainingModel:
    model = small_model(family, attention, dtype)
    if every is not None:
        enable_activation_checkpointing(model, every)
    return TrainingModel(model, "chunked").train()


def token_losses(model: TrainingModel, ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """The loss of each token, with itself as the label; like `ids`."""
    hidden, _ = model._hidden_states(ids, position_ids, wants_routers=False)
    logits = torch.nn.functional.linear(hidden, model.causal_lm.get_output_embeddings().weight)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
