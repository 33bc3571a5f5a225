"""The checks before the first step, one by one: what passes, what does not, and what is said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dsllm.ds_config import build_ds_config
from dsllm.engine.gates import check as check_module
from dsllm.engine.gates.check import Check, conclude, timed
from dsllm.engine.gates.small_run import Steps, own_tokens, shrink
from dsllm.engine.gates.training import agreement, first_loss, one_batch
from dsllm.engine.gates.weights import PIECE_ELEMENTS, check_weights, deviation, moments_of
from dsllm.errors import TrainingError
from dsllm.model.build import build_model, model_config
from dsllm.model.initialize import Distribution, initialize_weights
from dsllm.plan.model_shape import model_shape
from dsllm.spec.derived import initializer_range
from dsllm.spec.load import load_spec, preset_names

NORMAL = Distribution(0.0, 0.02)
LEAST_ELEMENTS = 7200
"""From which on a deviation that is wrong by a tenth is always found."""
FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def drawn(seed: int, elements: int, std: float = NORMAL.std) -> torch.Tensor:
    return torch.empty(elements).normal_(0.0, std, generator=torch.Generator().manual_seed(seed))


# --- weights ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    elements=st.integers(64, 20_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_right_draw_passes_whatever_its_size_and_type(seed: int, elements: int, dtype: torch.dtype) -> None:
    assert deviation(drawn(seed, elements).to(dtype), NORMAL) is None


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    elements=st.integers(LEAST_ELEMENTS, 20_000),
    factor=st.sampled_from([0.9, 1.1, 0.5, 2.0]),
)
def test_a_deviation_that_is_wrong_by_a_tenth_never_passes(seed: int, elements: int, factor: float) -> None:
    said = deviation(drawn(seed, elements, factor * NORMAL.std), NORMAL)
    assert said is not None
    assert said.endswith("where 0 and 0.02 are due")


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(100, 100),
        torch.full((100, 100), math.nan),
        torch.full((100, 100), math.inf),
        torch.where(torch.arange(10_000) == 17, math.nan, drawn(0, 10_000)),
        drawn(0, 10_000) + 0.002,
        torch.nn.Linear(100, 100).weight,
    ],
    ids=["zeros", "NaNs", "infinite", "one NaN", "a mean of a tenth of the deviation", "torch's own initialisation"],
)
def test_weights_that_nobody_drew_never_pass(weight: torch.Tensor) -> None:
    assert deviation(weight, NORMAL) is not None


def test_biases_and_norms_are_exact() -> None:
    norm = torch.ones(64, dtype=torch.bfloat16)
    assert deviation(norm, Distribution(1.0, 0.0)) is None
    assert deviation(torch.zeros(64), Distribution(0.0, 0.0)) is None
    norm[3] = 1.01
    assert deviation(norm, Distribution(1.0, 0.0)) == "is not 1 in 1 of 64 places"
    norm[4] = math.nan
    assert deviation(norm, Distribution(1.0, 0.0)) == "is not 1 in 2 of 64 places"


def test_mean_and_deviation_of_several_pieces_are_those_of_the_whole() -> None:
    weight = drawn(0, PIECE_ELEMENTS + 1000).view(-1, 8) + 0.01
    mean, std = weight.double().mean().item(), weight.double().std(correction=0).item()
    assert moments_of(weight) == (pytest.approx(mean, rel=1e-6), pytest.approx(std, rel=1e-6))


@FAMILIES
@pytest.mark.usefixtures("_one_rank")
def test_an_initialised_model_passes(family: str) -> None:
    model = built(family)
    initialize_weights(model, seed=1)
    check = check_weights(model)
    assert check.passed, check
    assert check.found == f"so in all {len(list(model.named_parameters()))}"


@pytest.mark.usefixtures("_one_rank")
def test_the_deviation_may_have_another_name() -> None:
    size = "hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, ffn_dim: 128, word_embed_proj_dim: 64"
    network = f"model={{family: auto, config: {{model_type: opt, {size}, init_std: 0.006}}}}"
    spec = load_spec("quickstart", [network])
    model = build_model(model_config(spec), torch.float32)
    initialize_weights(model, seed=1)
    check = check_weights(model)
    assert check.passed, check
    assert check.expected.startswith("matrices of deviation 0.006,")
    assert initializer_range(spec.model) == 0.006


@FAMILIES
@pytest.mark.usefixtures("_one_rank")
def test_a_model_that_was_never_initialised_does_not_pass_and_names_a_weight(family: str) -> None:
    model = built(family)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    check = check_weights(model)
    assert not check.passed
    name = next(name for name, _ in model.named_parameters())
    assert check.found.startswith(f"{name} has mean 0 and deviation 0 where 0 and 0.02 are due, and ")


@pytest.mark.usefixtures("_one_rank")
def test_residual_projections_without_their_factor_do_not_pass() -> None:
    config = model_config(load_spec("quickstart", ["model.hidden_size=96"]))
    check = check_weights(AutoModelForCausalLM.from_config(config))  # transformers' own Llama has no such factor
    assert "o_proj.weight has mean" in check.found
    assert check.found.endswith("and 7 more like it"), "two in each of four layers, and nothing else"


def built(family: str) -> torch.nn.Module:
    shape = "num_layers: 2, hidden_size: 128, num_attention_heads: 4"
    spec = load_spec("quickstart", [f"model={{family: {family}, {shape}}}"])
    return build_model(model_config(spec), torch.float32)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_shrinks_to_what_trains_in_seconds_with_its_own_settings(preset: str) -> None:
    spec = load_spec(preset)
    small = shrink(spec)
    assert model_shape(small).allocated_parameters < 200_000
    kept = ("family", "attention", "tie_word_embeddings", "initializer_range", "rope_theta", "norm_epsilon")
    assert [getattr(small.model, name) for name in kept] == [getattr(spec.model, name) for name in kept]
    assert (small.zero.stage, small.zero.overlap_comm) == (spec.zero.stage, spec.zero.overlap_comm)
    assert small.training.precision == spec.training.precision
    assert small.training.activation_checkpointing == spec.training.activation_checkpointing


def test_the_small_run_drops_nothing_out_and_leaves_experts_to_choose_among() -> None:
    auto = load_spec("quickstart", ["model={family: auto, config: {model_type: gpt_neox, hidden_dropout: 0.1}}"])
    assert {shrink(auto).model.config[key] for key in ("hidden_dropout", "attention_dropout")} == {0.0}
    network = "family: mixtral, num_layers: 2, hidden_size: 64, num_attention_heads: 4"
    spec = load_spec("quickstart", [f"model={{{network}, num_experts: 64, num_experts_per_token: 8}}"])
    assert shrink(spec).model.num_experts == 16


def test_offload_stays_and_sizes_of_a_large_model_do_not() -> None:
    zero = "zero={stage: 3, offload_optimizer: cpu, max_live_elements: 1000000000, reduce_bucket_elements: 500000000}"
    small = shrink(load_spec("1b", [zero, "batch.micro_batch_size=1"]))
    config = build_ds_config(small, 8, "cpu")["zero_optimization"]
    assert config["offload_optimizer"]["device"] == "cpu"
    assert config["reduce_bucket_size"] == model_shape(small).allocated_parameters // 3
    assert config["stage3_max_live_parameters"] <= model_shape(small).allocated_parameters


def test_ranks_read_tokens_of_their_own_and_no_more_than_can_be_learned_by_heart() -> None:
    assert torch.equal(own_tokens(0), own_tokens(0))
    assert not torch.equal(own_tokens(0), own_tokens(1))
    rows = torch.cat([own_tokens(rank) for rank in range(64)])
    assert len(rows.unique(dim=0)) == 8


def test_a_first_loss_must_be_near_that_of_ignorance() -> None:
    small = shrink(load_spec("quickstart"))
    assert first_loss(5.96, small).passed
    assert not first_loss(5.0, small).passed, "what labels give that are the inputs themselves"
    assert not first_loss(87.0, small).passed
    assert not first_loss(math.nan, small).passed
    assert first_loss(87.0, small).sentence().startswith("first loss: expected 5.96 within 0.5, about ln of the small")


def test_a_batch_is_learned_by_heart_or_not() -> None:
    assert one_batch(0.2).passed
    assert not one_batch(5.9).passed
    assert not one_batch(math.nan).passed


STEPS = Steps([5.96, 5.5, 5.2], [0.8, 0.9, 1.3])


@pytest.mark.parametrize(
    ("found", "precision", "said"),
    [
        (Steps([5.961, 5.502, 5.203], [0.8001, 0.901, 1.302]), "fp32", None),
        (Steps([5.965, 5.52, 5.23], [0.805, 0.92, 1.35]), "bf16", None),
        (Steps([5.96, 5.5, 5.2], [3.2, 0.9, 1.3]), "bf16", "gradient norm 3.2000 where 0.8000 is due, in step 1"),
        (Steps([5.96, 5.51, 5.2], [0.8, 0.9, 1.3]), "fp32", "loss 5.5100 where 5.5000 is due, in step 2"),
        (Steps([5.96, 5.5, math.nan], [0.8, 0.9, 1.3]), "bf16", "loss nan where 5.2000 is due, in step 3"),
    ],
    ids=["rounding of fp32", "rounding of bf16", "undivided gradients", "a loss of fp32", "NaN"],
)
def test_steps_agree_within_what_rounding_explains(found: Steps, precision: str, said: str | None) -> None:
    check = agreement("accumulation", found, STEPS, precision, "without it", "choose another")
    assert check.passed is (said is None)
    assert check.found == (said or "3 steps alike")


# --- answers ----------------------------------------------------------------------------------------------------------


def answer(name: str, passed: bool) -> Check:
    return Check(name, passed, "6.0", "87.0", "mend it", seconds=1.5)


@pytest.mark.usefixtures("_one_rank")
def test_what_passes_is_one_line_and_every_number_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", check_module.__name__)
    conclude([answer("weights", True), answer("first loss", True)], tmp_path / "checks.json")
    assert caplog.messages == ["checks  weights, first loss: passed in 3.0s"]
    kept = json.loads((tmp_path / "checks.json").read_text())
    assert kept["passed"] is True
    assert kept["checks"][0] == {
        "name": "weights",
        "passed": True,
        "expected": "6.0",
        "found": "87.0",
        "seconds": 1.5,
    }


@pytest.mark.usefixtures("_one_rank")
def test_what_fails_ends_the_run_with_both_numbers_the_remedy_and_the_switch(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as one:
        conclude([answer("weights", True), answer("first loss", False)], tmp_path / "checks.json")
    assert str(one.value) == (
        "check before the first step: first loss: expected 6.0; found 87.0; mend it; "
        "--set guards.step_0_checks=false trains without the checks"
    )
    with pytest.raises(TrainingError) as two:
        conclude([answer("weights", False), answer("first loss", False)], tmp_path / "checks.json")
    assert [line.split(":")[0] for line in str(two.value).splitlines()[1:]] == ["  weights", "  first loss"]
    assert str(two.value).startswith("2 checks before the first step failed; --set guards.step_0_checks=false")
    assert json.loads((tmp_path / "checks.json").read_text())["passed"] is False


def test_each_check_is_timed_by_what_it_took_to_make() -> None:
    answers = list(timed(answer(name, True) for name in ("weights", "first loss")))
    assert [check.name for check in answers] == ["weights", "first loss"]
    assert all(0 <= check.seconds < 1 for check in answers)
