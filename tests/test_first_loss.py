"""A first loss that no untrained model has ends the run."""

from __future__ import annotations

import pytest
import torch

from dsllm.engine import first_loss
from dsllm.engine.first_loss import check_first_loss, untrained_loss
from dsllm.errors import TrainingError
from dsllm.model.build import build_model, model_config
from dsllm.model.initialize import initialize_weights
from dsllm.plan.model_shape import model_shape
from dsllm.spec.load import load_spec, preset_names


def test_a_first_loss_that_no_untrained_model_has_stops_the_run_with_both_numbers() -> None:
    with pytest.raises(TrainingError, match=r"^step 1: the loss is 87\.00, where an untrained model has 6\.90 "):
        check_first_loss(87.0, 6.9)
    with pytest.raises(TrainingError, match=r"the loss is 1\.20, where an untrained model has 6\.90"):
        check_first_loss(1.2, 6.9)


def test_a_trained_model_may_begin_anywhere_below_and_not_far_above() -> None:
    for loss in (1.2, 6.9, 9.8):
        check_first_loss(loss, 6.9, is_untrained=False)
    with pytest.raises(TrainingError, match=r"^step 1: the loss is 87\.00, where even an untrained model has 6\.90; "):
        check_first_loss(87.0, 6.9, is_untrained=False)


def test_a_sound_first_loss_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", first_loss.__name__)
    check_first_loss(7.1, 6.9)
    assert caplog.messages == ["first loss 7.100; a model that has learned nothing has 6.900"]


def test_an_error_of_training_exits_with_1() -> None:
    assert TrainingError.exit_code == 1


@pytest.mark.parametrize("overrides", [[], ["model.initializer_range=0.1"], ["model.tie_word_embeddings=false"]])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_first_loss_of_a_fresh_model_is_the_one_foretold(family: str, overrides: list[str]) -> None:
    shape = "num_layers: 2, hidden_size: 128, num_attention_heads: 4"
    spec = load_spec("quickstart", [f"model={{family: {family}, {shape}}}", *overrides])
    model = build_model(model_config(spec), torch.float32)
    initialize_weights(model, spec.seed)
    ids = torch.randint(4096, (2, 129), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(untrained_loss(model_shape(spec), spec), abs=0.3)


@pytest.mark.parametrize("preset", preset_names())
def test_what_is_foretold_for_a_preset_is_about_ln_of_its_vocabulary(preset: str) -> None:
    spec = load_spec(preset)
    expected = float(torch.tensor(float(spec.vocab_size)).log())
    assert untrained_loss(model_shape(spec), spec) == pytest.approx(expected, abs=1.0)
