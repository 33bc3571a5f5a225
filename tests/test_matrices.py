"""Muon's matrices: which they are, how they are made orthogonal, and which rank does it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsllm.engine import muon
from dsllm.engine.fragments import Fragment
from dsllm.engine.matrices import EXCHANGED_ELEMENTS, Division, Matrix, divide
from dsllm.engine.muon import MuonAdamW, matrix_scales, orthogonalized
from dsllm.engine.optimizer import own_optimizer, parameter_groups
from dsllm.model.build import build_model, model_config
from dsllm.model.initialize import initialize_weights
from dsllm.model.loss import TrainingModel
from dsllm.spec.load import load_spec

FAMILIES = {
    "gpt2": "model={family: gpt2, num_layers: 2, hidden_size: 32, num_attention_heads: 4}",
    "llama": "model={family: llama, num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_key_value_heads: 2}",
}
PER_BLOCK = {"gpt2": 4, "llama": 7}


def training_model(family: str, *overrides: str) -> TrainingModel:
    spec = load_spec("quickstart", [FAMILIES[family], "optimizer.name=muon", *overrides])
    model = build_model(model_config(spec), torch.float32)
    initialize_weights(model, spec.seed)
    return TrainingModel(model, "chunked")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_muon_has_the_matrices_of_blocks_and_neither_embeddings_nor_head_nor_vectors(family: str, tied: str) -> None:
    model = training_model(family, f"model.tie_word_embeddings={tied}")
    names = {parameter: name for name, parameter in model.named_parameters()}
    of_muon = [names[parameter] for parameter in matrix_scales(model)]
    assert len(of_muon) == 2 * PER_BLOCK[family]
    assert all(".0." in name or ".1." in name for name in of_muon)
    assert not any("norm" in name or "ln_" in name for name in of_muon)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_is_scaled_by_outputs_over_inputs_however_the_family_stores_a_matrix(family: str) -> None:
    model = training_model(family, "model.intermediate_size=128")
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales = {names[parameter].split(".", 4)[-1]: scale for parameter, scale in matrix_scales(model).items()}
    wide, narrow = {
        "gpt2": ("mlp.c_fc.weight", "mlp.c_proj.weight"),
        "llama": ("mlp.up_proj.weight", "mlp.down_proj.weight"),
    }[family]
    assert (scales[wide], scales[narrow]) == (2.0, 1.0)


def test_groups_of_muon_have_its_own_momentum_and_rate_and_every_parameter_is_in_one_group() -> None:
    settings = load_spec("quickstart", ["optimizer={name: muon, learning_rate: 1.0e-3, weight_decay: 0.2}"]).optimizer
    model = training_model("gpt2")
    of_muon, matrices, vectors = parameter_groups(model, settings)
    assert (of_muon["momentum"], of_muon["rate_ratio"], of_muon["weight_decay"]) == (0.95, pytest.approx(20.0), 0.2)
    assert [group["weight_decay"] for group in (matrices, vectors)] == [0.2, 0.0]
    together = [id(parameter) for group in (of_muon, matrices, vectors) for parameter in group["params"]]
    assert sorted(together) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8), (3, 8, 24)])
def test_an_orthogonal_matrix_has_the_same_directions_and_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.mT @ orthogonalized(matrix) @ right.mT
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(found, torch.diag_embed(diagonal), atol=1e-4)
    assert bool(((diagonal > 0.5) & (diagonal < 1.25)).all()), "the quintic takes them to about 0.7 to 1.2"
    assert bool((values[..., 0] / values[..., -1] > 2).all()), "they were not near each other before"


def test_stacked_experts_are_updated_as_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0))
    expected = 2.0 * orthogonalized(stack)
    sizes = []

    def watched(matrix: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(matrix.shape))
        return orthogonalized(matrix)

    monkeypatch.setattr(muon, "orthogonalized", watched)
    found = muon._update(stack, Matrix((3, 8, 24), 2.0, ()))
    assert torch.allclose(found, expected, atol=1e-5)
    assert sizes == [(8, 24)] * 3, "copies are of one matrix"


def test_a_matrix_of_zeros_has_no_update() -> None:
    assert not orthogonalized(torch.zeros(4, 8)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has a Muon of its own from 2.9 on")
def test_steps_are_those_of_torchs_own_muon() -> None:
    torch.manual_seed(0)
    weights = torch.randn(16, 48)
    theirs, ours = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.clone())
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
    group = {"params": [ours], "momentum": 0.95, "weight_decay": 0.1}
    optimizer = MuonAdamW([group], lr=0.02)
    pieces = [[Fragment(0, 0, weights.numel(), 0, 0)]]
    optimizer.divisions = {ours: divide(pieces, {0: (16, 48)}, {0: 1.0}, 0)[0]}
    optimizer.dtype = torch.bfloat16
    for _ in range(3):
        gradient = torch.randn(16, 48)
        theirs.grad, ours.grad = gradient.clone(), gradient.clone()
        reference.step()
        optimizer.step()
    apart, moved = (ours - theirs).detach().norm(), (theirs - weights).detach().norm()
    assert float(apart / moved) < 0.03, "more than bf16, which rounds in another order here, explains"


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (3, "fp16")])
def test_muon_is_handed_to_deepspeed_at_every_stage(stage: int, precision: str) -> None:
    spec = load_spec("quickstart", ["optimizer.name=muon", f"zero.stage={stage}", f"training.precision={precision}"])
    assert isinstance(own_optimizer(spec, parameter_groups(training_model("gpt2"), spec.optimizer)), MuonAdamW)


CUT = {0: (4, 8), 1: (8, 8), 2: (2, 3)}


@given(st.integers(1, 5))
def test_ranks_agree_on_what_they_exchange_and_each_matrix_has_one_owner(num_ranks: int) -> None:
    divisions = [divide(laid_end_to_end(num_ranks), CUT, dict.fromkeys(CUT, 1.0), rank)[0] for rank in range(num_ranks)]
    owned = [matrix.shape for division in divisions for matrix in every_matrix(division)]
    assert sorted(owned) == sorted(CUT.values())
    for number in range(len(divisions[0].exchanges)):
        exchanges = [division.exchanges[number] for division in divisions]
        for sender, receiver in ((s, r) for s in range(num_ranks) for r in range(num_ranks)):
            sent = list(exchanges[sender].sent[receiver])
            assert sent == [piece for _, piece in exchanges[receiver].received[sender]]


def test_a_matrix_that_is_cut_goes_to_the_least_busy_of_its_holders() -> None:
    """Rank 0 has a large one of its own, so that what both hold is rank 1's."""
    fragments = [
        [Fragment(0, 0, 64 * 64, 0, 0), Fragment(1, 0, 32, 0, 64 * 64)],
        [Fragment(1, 32, 32, 0, 0)],
    ]
    shapes = {0: (64, 64), 1: (8, 8)}
    first, second = (divide(fragments, shapes, {0: 1.0, 1: 1.0}, rank)[0] for rank in (0, 1))
    assert [matrix.shape for matrix in first.whole] == [(64, 64)]
    assert [matrix.shape for matrix in second.exchanges[0].own] == [(8, 8)]


def test_so_much_travels_at_a_time_that_memory_holds_it() -> None:
    side = math.isqrt(EXCHANGED_ELEMENTS)
    halves = [
        [Fragment(place, rank * side * side // 2, side * side // 2, 0, place * side * side // 2) for place in range(4)]
        for rank in range(2)
    ]
    shapes = dict.fromkeys(range(4), (side, side))
    division = divide(halves, shapes, dict.fromkeys(shapes, 1.0), 0)[0]
    assert [sum(len(to_one) for to_one in exchange.sent) for exchange in division.exchanges] == [2, 2]


def laid_end_to_end(num_ranks: int) -> list[list[Fragment]]:
    """The matrices of CUT in one flat tensor, cut evenly, as stages 1 and 2 have them."""
    ends = [0]
    for shape in CUT.values():
        ends.append(ends[-1] + math.prod(shape))
    share = -(-ends[-1] // num_ranks)
    fragments: list[list[Fragment]] = []
    for rank in range(num_ranks):
        own = []
        for parameter, (start, end) in enumerate(itertools.pairwise(ends)):
            first, last = max(start, rank * share), min(end, (rank + 1) * share)
            if first < last:
                own.append(Fragment(parameter, first - start, last - first, 0, first - rank * share))
        fragments.append(own)
    return fragments


def every_matrix(division: Division) -> list:
    return [*division.whole, *(matrix for exchange in division.exchanges for matrix in exchange.own)]
