"""The balancing loss of experts is transformers' own, of each sequence, and touches gradients alone."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dsllm.model.balance import Balance, balance_of, with_gradient_of
from dsllm.model.build import build_model, enable_activation_checkpointing, model_config
from dsllm.model.initialize import initialize_weights
from dsllm.model.loss import TrainingModel
from dsllm.spec.load import load_spec

WEIGHT, EXPERTS, CHOSEN, LAYERS, LENGTH = 0.5, 4, 2, 3, 16


def test_a_sequence_by_itself_has_the_loss_of_transformers_in_value_and_gradient() -> None:
    model, ids = mixtral(), tokens(1)
    found = TrainingModel(mixtral(), "plain").train()
    loss = found(ids[:, :-1], ids[:, 1:])
    loss.backward()
    labels = ids[:, 1:]
    expected = model.train()(input_ids=ids[:, :-1], output_router_logits=True)
    cross_entropy = torch.nn.functional.cross_entropy(expected.logits.flatten(0, 1), labels.flatten())
    (cross_entropy + WEIGHT * expected.aux_loss).backward()
    assert loss.item() == pytest.approx(cross_entropy.item(), abs=1e-6), "what is reported is cross-entropy alone"
    assert found.balance_loss.item() == pytest.approx(expected.aux_loss.item(), abs=1e-6)
    for one, other in zip(found.causal_lm.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_batch_has_the_mean_of_its_sequences_however_it_is_cut(is_checkpointed: bool) -> None:
    ids = tokens(4)
    whole, parts = (TrainingModel(mixtral(is_checkpointed), "chunked").train() for _ in range(2))
    whole(ids[:, :-1], ids[:, 1:]).backward()
    balances = []
    for micro_batch in ids.split(1):
        (parts(micro_batch[:, :-1], micro_batch[:, 1:]) / 4).backward()
        balances.append(parts.balance_loss)
    assert whole.balance_loss.item() == pytest.approx(torch.stack(balances).mean().item(), abs=1e-6)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_transformers_takes_the_mean_over_all_rows_of_all_layers() -> None:
    # what lets a sequence's layers come in one piece
    logits = tuple(torch.randn(LENGTH, EXPERTS, generator=torch.Generator().manual_seed(n)) for n in range(LAYERS))
    balance = Balance(WEIGHT, EXPERTS, CHOSEN, load_balancing_loss_func)
    expected = load_balancing_loss_func(logits, EXPERTS, CHOSEN)
    assert balance.loss(logits, num_sequences=1).item() == pytest.approx(expected.item(), abs=1e-6)


def test_an_even_router_has_the_least_loss_and_one_expert_for_all_the_most() -> None:
    balance = Balance(WEIGHT, EXPERTS, CHOSEN, load_balancing_loss_func)
    turns = torch.eye(EXPERTS).repeat(LENGTH // EXPERTS, 1)
    even = 5.0 * (turns + turns.roll(1, dims=1))
    uneven = torch.tensor([9.0, 9.0, 0.0, 0.0]).expand(LENGTH, EXPERTS)
    assert balance.loss([even], 1).item() == pytest.approx(CHOSEN, abs=1e-5)
    assert balance.loss([uneven], 1).item() == pytest.approx(CHOSEN * EXPERTS / 2, abs=1e-2)


def test_evaluation_has_no_balancing_loss() -> None:
    model, ids = TrainingModel(mixtral(), "chunked").eval(), tokens(2)
    with torch.no_grad():
        model(ids[:, :-1], ids[:, 1:])
        logits = model(ids)
    assert model.balance_loss is None
    assert logits.shape == (2, LENGTH + 1, 512)


@pytest.mark.parametrize("model", ["family: llama", "family: mixtral, balance_loss_weight: 0.0"])
def test_models_without_experts_or_weight_have_no_balance(model: str) -> None:
    assert balance_of(built(model)) is None


def test_a_loss_is_the_same_to_the_bit_with_the_gradient_of_another() -> None:
    loss, beside = torch.tensor(1 / 3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    joined = with_gradient_of(loss * 1.0, beside**2)
    assert joined.item() == loss.item()
    (3 * joined).backward()
    assert (loss.grad.item(), beside.grad.item()) == (3.0, 12.0)


def mixtral(is_checkpointed: bool = False) -> PreTrainedModel:
    model = built(f"family: mixtral, num_experts: {EXPERTS}, balance_loss_weight: {WEIGHT}")
    if is_checkpointed:
        enable_activation_checkpointing(model, every=1)
    return model


def built(model: str) -> PreTrainedModel:
    spec = load_spec(
        "quickstart",
        [
            f"model={{{model}, num_layers: {LAYERS}, hidden_size: 64, num_attention_heads: 4}}",
            "tokenizer={kind: bpe, vocab_size: 500}",
            "training.precision=fp32",
        ],
    )
    built = build_model(model_config(spec), torch.float32)
    initialize_weights(built, spec.seed)
    return built


def tokens(sequences: int) -> torch.Tensor:
    return torch.randint(500, (sequences, LENGTH + 1), generator=torch.Generator().manual_seed(0))
