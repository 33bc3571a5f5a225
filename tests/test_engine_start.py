"""What is settled before the first step: the device's types, the loss, the optimizer and its groups."""

from __future__ import annotations

import copy
from types import NoneType, SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import FusedAdam

from dsllm.engine import muon, ranks, start
from dsllm.engine.optimizer import SkippingAdamW, own_optimizer, parameter_groups
from dsllm.engine.start import allow_tf32, check_precision, kernels, loss_implementation, lost_speed
from dsllm.errors import UserError
from dsllm.model.build import build_model, model_config
from dsllm.model.initialize import initialize_weights
from dsllm.model.kernels import liger_is_installed
from dsllm.model.loss import TrainingModel
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Optimizer

ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")


def test_a_precision_that_the_device_lacks_is_the_users_mistake_and_names_those_it_has() -> None:
    if get_accelerator().is_fp16_supported():
        pytest.skip("this device computes in fp16")
    with pytest.raises(UserError, match=r"^training.precision: given fp16, in which this cpu cannot compute; set"):
        check_precision("fp16")


@ON_A_CPU
def test_a_gpu_that_only_emulates_bf16_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch asks a V100, and what that answers."""
    monkeypatch.setattr(ranks, "device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=7))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported(), "torch counts emulation"
    with pytest.raises(UserError, match=r"^training.precision: given bf16, in which this .* cannot compute; set it to"):
        check_precision("bf16")
    assert muon._arithmetic(torch.bfloat16) == torch.float32


def test_fp32_runs_anywhere() -> None:
    check_precision("fp32")


def test_the_automatic_loss_is_fused_where_that_can_run_else_chunked() -> None:
    assert loss_implementation(load_spec("quickstart")) == "chunked"
    assert loss_implementation(load_spec("quickstart", ["training.loss=plain"])) == "plain"


@ON_A_CPU
@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_automatic_kernels_are_torchs_where_liger_kernel_cannot_run(wanted: str) -> None:
    assert kernels(load_spec("quickstart", [f"training.kernels={wanted}"]), "llama") == "torch"


@ON_A_CPU
def test_kernels_and_a_loss_that_need_a_gpu_are_refused_on_a_cpu_with_what_can_run() -> None:
    with pytest.raises(UserError, match=r"^training.kernels: given liger, whose kernels need a CUDA GPU.* or torch$"):
        kernels(load_spec("quickstart", ["model.family=llama", "training.kernels=liger"]), "llama")
    with pytest.raises(UserError, match=r"^training.loss: given fused, whose kernels need a CUDA GPU.* or chunked$"):
        loss_implementation(load_spec("quickstart", ["training.loss=fused"]))


@pytest.mark.skipif(liger_is_installed(), reason="liger-kernel is installed")
def test_liger_kernel_that_is_not_installed_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "device_type", lambda: "cuda")
    with pytest.raises(UserError, match=r"which needs liger-kernel; pip install liger-kernel, or set it to auto"):
        kernels(load_spec("quickstart", ["model.family=llama", "training.kernels=liger"]), "llama")


@pytest.mark.skipif(not liger_is_installed(), reason="liger-kernel is not installed")
def test_a_family_that_liger_kernel_does_not_have_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "device_type", lambda: "cuda")
    with pytest.raises(UserError, match=r"^training.kernels: given liger, which has none for the family gpt_neox"):
        kernels(load_spec("quickstart", ["model.family=llama", "training.kernels=liger"]), "gpt_neox")


@pytest.mark.parametrize(("stage", "is_compiled"), [(2, True), (3, False), (3, True)])
def test_compiled_blocks_at_stage_3_are_warned_of_since_hooks_cut_them(stage: int, is_compiled: bool) -> None:
    spec = load_spec("quickstart", [f"zero={{stage: {stage}}}", f"training.compile={str(is_compiled).lower()}"])
    lost = [line for line in lost_speed(spec) if "whose hooks cut each block into pieces" in line]
    assert len(lost) == (stage == 3 and is_compiled)


@ON_A_CPU
def test_fp32_products_stay_exact_on_a_cpu_whatever_the_spec_says_of_tf32() -> None:
    before = torch.get_float32_matmul_precision()
    allow_tf32(True)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_adamw_that_is_not_fused_takes_the_same_steps(precision: str) -> None:
    torch.manual_seed(0)
    first = torch.nn.Linear(8, 8)
    models = [first, copy.deepcopy(first)]
    for model, fused in zip(models, ("true", "false"), strict=True):
        spec = load_spec("quickstart", ["zero.stage=0", f"training.precision={precision}", f"optimizer.fused={fused}"])
        optimizer = own_optimizer(spec, parameter_groups(model, spec.optimizer))
        assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (fused == "true", fused == "false")
        for step in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * step)
            optimizer.step()
    assert torch.allclose(models[0].weight, models[1].weight, atol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_matrices_decay_vectors_do_not_and_each_parameter_is_in_one_group(family: str, tied: str) -> None:
    model = training_model(family, f"model.tie_word_embeddings={tied}")
    decayed, spared = parameter_groups(model, Optimizer(weight_decay=0.1))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in spared["params"])
    everything = [id(parameter) for parameter in model.parameters()]
    assert sorted(id(p) for group in (decayed, spared) for p in group["params"]) == sorted(everything)


def test_a_partitioned_matrix_is_known_by_its_true_shape() -> None:
    model = torch.nn.Linear(4, 4)
    model.weight.data = torch.empty(0)
    model.weight.ds_shape = torch.Size([4, 4])  # what ZeRO-3 leaves of it
    decayed, spared = parameter_groups(model, Optimizer(weight_decay=0.1))
    assert [len(group["params"]) for group in (decayed, spared)] == [1, 1]
    assert decayed["params"][0] is model.weight


@pytest.mark.parametrize(
    ("stage", "precision", "kind"),
    [(0, "bf16", FusedAdam), (0, "fp16", FusedAdam), (0, "fp32", SkippingAdamW), (1, "bf16", NoneType)],
)
def test_deepspeed_makes_the_optimizer_but_at_stage_0(stage: int, precision: str, kind: type) -> None:
    spec = load_spec("quickstart", [f"zero.stage={stage}", f"training.precision={precision}"])
    assert isinstance(own_optimizer(spec, parameter_groups(torch.nn.Linear(2, 2), spec.optimizer)), kind)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_own_optimizer_steps_as_torchs_adamw_does_but_for_deepspeeds_step_on_zero_gradients(precision: str) -> None:
    spec = load_spec("quickstart", ["zero.stage=0", f"training.precision={precision}"])
    models = [torch.nn.Linear(8, 8)]
    models.append(copy.deepcopy(models[0]))
    ours = own_optimizer(spec, parameter_groups(models[0], spec.optimizer))
    theirs = torch.optim.AdamW(
        parameter_groups(models[1], spec.optimizer), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    if precision == "bf16":
        for parameter in models[0].parameters():
            parameter.grad = torch.zeros_like(parameter)
        ours.step()
    for step in range(3):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (model(torch.full((1, 8), step + 1.0)) ** 2).sum().backward()
            optimizer.step()
    for found, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(found, expected)


def training_model(family: str, *overrides: str) -> TrainingModel:
    shape = "num_layers: 2, hidden_size: 32, num_attention_heads: 4"
    spec = load_spec("quickstart", [f"model={{family: {family}, {shape}}}", *overrides])
    model = build_model(model_config(spec), torch.float32)
    initialize_weights(model, spec.seed)
    return TrainingModel(model, "chunked")
