"""Whose numbers are not finite; tests/distributed/test_numbers.py has it on real ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, LossScaleConfig

from dsllm.engine.nonfinite import Fault, loss_scale_can_fall, own_gradients_watched, poisoned

SCALE = {"init_scale": 4.0, "scale_window": 1000, "min_scale": 1.0, "delayed_shift": 1, "consecutive_hysteresis": False}


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_has_no_finite_gradients(value: float) -> None:
    weight = torch.ones(3, requires_grad=True)
    poisoned(weight.sum() + value).backward()
    assert weight.grad.isnan().all()


def test_a_finite_loss_keeps_its_gradients_to_the_bit() -> None:
    weights = [torch.rand(64, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    losses = [(weight**3).mean() for weight in weights]
    poisoned(losses[0]).backward()
    losses[1].backward()
    assert torch.equal(weights[0].grad, weights[1].grad)


def test_watched_gradients_are_named_in_the_order_of_backward_and_only_within() -> None:
    module = torch.nn.Sequential(*[torch.nn.Linear(2, 2, bias=False) for _ in range(3)])
    with own_gradients_watched(module) as found:
        (module(torch.ones(1, 2)).sum() * torch.nan).backward()
    assert found == ["2.weight", "1.weight", "0.weight"]
    (module(torch.ones(1, 2)).sum() * torch.nan).backward()
    assert len(found) == 3
    with own_gradients_watched(module) as found:
        module(torch.ones(1, 2)).sum().backward()
    assert found == []


def test_a_dynamic_loss_scale_can_fall_until_its_minimum() -> None:
    scaler = CreateLossScaler(torch.half, 1.0, True, SCALE)
    engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
    assert loss_scale_can_fall(engine)
    scaler.cur_scale = 1.0
    assert not loss_scale_can_fall(engine)


def test_a_dynamic_loss_scale_of_stage_0_can_fall_until_its_minimum() -> None:
    config = LossScaleConfig(torch.float16, True, 1.0, SCALE)
    engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scale_config=config))
    assert loss_scale_can_fall(engine)
    config.cur_scale = 1.0
    assert not loss_scale_can_fall(engine)


def test_no_scale_can_fall_where_there_is_none_or_it_is_fixed() -> None:
    for optimizer in (
        torch.optim.AdamW([torch.ones(1, requires_grad=True)]),
        SimpleNamespace(loss_scaler=CreateLossScaler(torch.bfloat16, 1.0, False, None)),
        SimpleNamespace(loss_scale_config=LossScaleConfig(torch.bfloat16, False, 1.0, None)),
    ):
        assert not loss_scale_can_fall(SimpleNamespace(optimizer=optimizer))


def test_a_rank_whose_loss_is_at_fault_is_not_blamed_for_its_gradients_too() -> None:
    fault = Fault("skipped", losses=(2,), gradients={0: "a.weight"})
    assert fault.ranks == [0, 2]
    assert fault.causes() == ["the gradient of a.weight on rank 0", "the loss of rank 2"]
