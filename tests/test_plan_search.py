"""The choices that dsllm makes: micro-batch sizes, stages, typical shapes and known GPUs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllm.errors import UserError
from dsllm.plan.hardware import GPUS, gpu_named, gpu_of_device
from dsllm.plan.memory import estimate_memory
from dsllm.plan.model_shape import model_shape
from dsllm.plan.search import at_stage, choose_micro_batch
from dsllm.plan.typical import typical_spec
from dsllm.spec.load import dump_spec, load_spec, parse_spec
from dsllm.spec.yaml_text import parse_yaml

GIB = 2**30


def test_the_largest_micro_batch_that_fits_is_chosen() -> None:
    spec = load_spec("gpt2-124m")
    chosen = choose_micro_batch(spec, 8, 40 * GIB)
    assert 64 % chosen == 0
    assert estimate_memory(spec, 8, chosen).fits(40 * GIB)
    assert chosen == 64 or not estimate_memory(spec, 8, 2 * chosen).fits(40 * GIB)


def test_more_memory_never_chooses_less() -> None:
    sizes = [choose_micro_batch(load_spec("llama-1b"), 8, gib * GIB) for gib in (16, 24, 40, 80, 141)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_one_is_tried_where_nothing_is_predicted_to_fit() -> None:
    assert choose_micro_batch(load_spec("llama-7b"), 1, 8 * GIB) == 1


def test_a_number_in_the_spec_is_kept() -> None:
    assert choose_micro_batch(load_spec("1b"), 8, 8 * GIB) == 8


def test_a_batch_that_does_not_divide_is_refused_for_auto_too() -> None:
    with pytest.raises(UserError, match="given 512; micro_batch_size 1 on 3 ranks takes 3 sequences"):
        choose_micro_batch(load_spec("gpt2-124m"), 3, 40 * GIB)


@pytest.mark.parametrize("stage", range(4))
def test_a_spec_at_another_stage_is_a_valid_spec(stage: int) -> None:
    overrides = [
        "zero.stage=3",
        "zero.offload_optimizer=nvme",
        "zero.offload_param=cpu",
        "zero.nvme_path=/nvme",
        "zero.max_live_elements=1000",
        "zero.reduce_bucket_elements=1000",
        "training.gradient_accumulation_precision=fp32",
    ]
    staged = at_stage(load_spec("1b", overrides), stage)
    assert staged.zero.stage == stage
    assert parse_spec(parse_yaml(dump_spec(staged), "dump")) == staged


@given(st.integers(10**7, 10**11))
@settings(max_examples=60, deadline=None)
def test_a_typical_shape_has_about_the_parameters(parameters: int) -> None:
    shape = model_shape(typical_spec(parameters))
    assert abs(shape.parameters - parameters) / parameters < 0.15


def test_gpus_are_listed_by_memory_under_names_of_their_own() -> None:
    assert [gpu.memory_bytes for gpu in GPUS] == sorted(gpu.memory_bytes for gpu in GPUS)
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla T4", "t4-16gb"),
        ("NVIDIA A10G", "a10g-24gb"),
        ("NVIDIA L4", "l4-24gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090-24gb"),
        ("NVIDIA B200", "b200-180gb"),
    ],
)
def test_a_device_is_known_by_the_name_that_cuda_reports(device: str, name: str) -> None:
    gpu = gpu_of_device(device)
    assert gpu is not None
    assert gpu.name == name


@pytest.mark.parametrize("device", ["NVIDIA L40S", "Tesla V100-SXM2-16GB", "NVIDIA H100 PCIe", "NVIDIA A10"])
def test_a_device_that_is_not_in_the_catalogue_is_not_taken_for_another(device: str) -> None:
    assert gpu_of_device(device) is None


def test_a_gpu_may_be_named_without_its_memory_where_one_is_meant() -> None:
    assert gpu_named("H100").name == "h100-80gb"
    with pytest.raises(UserError, match="GPU: given 'a100'; must be one of a100-40gb, a100-80gb"):
        gpu_named("a100")
    with pytest.raises(UserError, match="GPU: given 'tpu'; must be one of t4-16gb, "):
        gpu_named("tpu")
