"""What orthogonalising takes: arithmetic as torch counts it, and memory by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsllm.engine.muon import matrix_scales, orthogonalized
from dsllm.model.build import build_model, model_config
from dsllm.model.loss import TrainingModel
from dsllm.plan.muon import EXCHANGED_ELEMENTS, orthogonalisation_bytes, orthogonalisation_flops
from dsllm.plan.workload import workload
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec

SMALL = "num_layers: 2, hidden_size: 32, num_attention_heads: 4"
FAMILIES = {
    "gpt2": f"model={{family: gpt2, {SMALL}}}",
    "llama": f"model={{family: llama, {SMALL}, num_key_value_heads: 2, intermediate_size: 80}}",
    "mixtral": f"model={{family: mixtral, {SMALL}, intermediate_size: 48, num_experts: 4}}",
}


def spec_of(family: str, *overrides: str) -> Spec:
    return load_spec("quickstart", [FAMILIES[family], "optimizer.name=muon", "training.precision=bf16", *overrides])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_arithmetic_of_a_step_is_what_torch_counts(family: str) -> None:
    spec = spec_of(family)
    model = TrainingModel(build_model(model_config(spec), torch.float32), "chunked")
    with FlopCounterMode(display=False) as counter:
        for parameter in matrix_scales(model):
            orthogonalized(torch.ones_like(parameter, requires_grad=False))
    assert orthogonalisation_flops(workload(spec)) == counter.get_total_flops()


def test_a_step_holds_five_copies_of_a_matrix_and_of_stacked_experts_one_and_four_of_one_of_them() -> None:
    assert orthogonalisation_bytes(workload(spec_of("gpt2", "zero.stage=2")), 2) == 2 * 5 * 32 * 128
    gates_and_ups = 2 * 48 * 32
    assert orthogonalisation_bytes(workload(spec_of("mixtral", "zero.stage=2")), 2) == 2 * (4 + 4) * gates_and_ups


def test_at_stage_3_a_whole_tensor_arrives_even_where_a_rank_has_little() -> None:
    run = workload(spec_of("gpt2", "zero.stage=3"))
    matrices = 2 * 12 * 32**2
    largest = 4 * 32**2
    assert orthogonalisation_bytes(run, 2) == 2 * (5 * largest + 3 * matrices // 2)
    assert orthogonalisation_bytes(run, 64) == 2 * (5 * largest + 2 * matrices // 64 + largest)


def test_no_more_than_a_share_of_the_wire_is_sent_at_a_time() -> None:
    large = workload(load_spec("llama-1b", ["optimizer.name=muon", "zero.stage=3"]))
    largest = 2048 * 5632
    assert largest < EXCHANGED_ELEMENTS
    assert orthogonalisation_bytes(large, 2) == 2 * (5 * largest + 3 * EXCHANGED_ELEMENTS)
