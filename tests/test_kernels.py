"""liger-kernel's kernels in a model, by a stand-in for the library: its own need a GPU.

The stand-in replaces names of transformers' modules as liger-kernel 0.8.5 does; what is computed with it means nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from dsllm.engine import start
from dsllm.engine.start import kernels, loss_implementation, lost_speed
from dsllm.errors import UserError
from dsllm.model.build import build_model, model_config
from dsllm.model.initialize import initialize_weights
from dsllm.model.kernels import OnCuda, liger_fault, use_liger_kernels
from dsllm.spec.load import load_spec

LLAMA = "model={family: llama, num_layers: 2, hidden_size: 32, num_attention_heads: 4}"
REPLACED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")


@pytest.fixture(autouse=True)
def _no_library() -> Iterator[None]:
    """liger-kernel is imported anew in each test, and forgotten after it."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "liger_kernel"}
    family = dict(vars(modeling_llama))
    for name in before:
        del sys.modules[name]
    liger_fault.cache_clear()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        del sys.modules[name]
    sys.modules.update(before)
    vars(modeling_llama).update(family)
    liger_fault.cache_clear()


# --- in a model -------------------------------------------------------------------------------------------------------


def fused_rotary(query: Any, *others: Any) -> str:
    """In the place of Triton's kernel, which a CPU cannot run."""
    assert query.is_cuda, "a tensor on the CPU came to the fused kernel"
    return "fused"


@pytest.fixture
def put_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The stand-in; what it was asked to put in, at each call."""
    asked: list[dict[str, Any]] = []

    def apply_to_llama(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model: PreTrainedModel | None = None,
    ) -> None:
        asked.append({"losses": cross_entropy or fused_linear_cross_entropy, "swiglu": swiglu, "model": model})
        modeling_llama.apply_rotary_pos_emb = fused_rotary
        modeling_llama.LlamaRMSNorm = modeling_llama.LlamaMLP = object

    library = ModuleType("liger_kernel.transformers.monkey_patch")
    library.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama}  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    return asked


def small_llama(*overrides: str) -> PreTrainedModel:
    spec = load_spec("quickstart", [LLAMA, *overrides])
    model = build_model(model_config(spec), torch.float32)
    initialize_weights(model, 0)
    return model


def test_what_liger_kernel_changes_outside_of_the_model_is_taken_back(put_in) -> None:
    rotary, norm, feed_forward = (getattr(modeling_llama, name) for name in REPLACED)
    model = small_llama()
    use_liger_kernels(model)
    assert put_in == [{"losses": False, "swiglu": True, "model": model}]
    assert (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP) == (norm, feed_forward)
    assert OnCuda(fused_rotary, rotary) == modeling_llama.apply_rotary_pos_emb


def test_rotary_positions_are_the_plain_ones_for_tensors_on_the_cpu_and_fused_on_cuda(put_in) -> None:
    model, tokens = small_llama(), torch.arange(16).view(1, 16)
    before = model(tokens).logits
    use_liger_kernels(model)
    assert torch.equal(model(tokens).logits, before)
    assert modeling_llama.apply_rotary_pos_emb(SimpleNamespace(is_cuda=True), None) == "fused"


def test_a_second_model_wraps_the_plain_function_and_not_the_first_models(put_in) -> None:
    rotary = modeling_llama.apply_rotary_pos_emb
    for _ in range(2):
        use_liger_kernels(small_llama())
    assert len(put_in) == 2
    assert modeling_llama.apply_rotary_pos_emb.plain is rotary


def test_gated_layers_of_another_function_than_silu_stay_transformers_own(put_in) -> None:
    model = small_llama()
    model.config.hidden_act = "gelu"
    use_liger_kernels(model)
    assert [asked["swiglu"] for asked in put_in] == [False]


# --- a library that cannot be imported --------------------------------------------------------------------------------


@pytest.fixture
def _is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed liger-kernel that cannot be imported, on what stands for a GPU."""
    package = tmp_path / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("raise ImportError('it takes another transformers\\nand more of it')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(start, "device_type", lambda: "cuda")


@pytest.mark.usefixtures("_is_broken")
def test_automatic_kernels_do_without_a_liger_kernel_that_cannot_be_imported_and_say_so() -> None:
    spec = load_spec("quickstart", [LLAMA])
    assert (kernels(spec, "llama"), loss_implementation(spec)) == ("torch", "chunked")
    assert list(lost_speed(spec)) == [
        "liger-kernel is installed and cannot be imported (it takes another transformers): torch's kernels take its "
        "place"
    ]
    without = ["training.kernels=torch", "training.loss=chunked"]
    assert list(lost_speed(load_spec("quickstart", [LLAMA, *without]))) == []


@pytest.mark.usefixtures("_is_broken")
def test_a_liger_kernel_that_is_named_and_cannot_be_imported_is_refused_with_its_reason() -> None:
    reason = r", and the installed liger-kernel cannot be imported \(it takes another transformers\); mend"
    with pytest.raises(UserError, match=f"^training.kernels: given liger{reason}.* or torch$"):
        kernels(load_spec("quickstart", [LLAMA, "training.kernels=liger"]), "llama")
    with pytest.raises(UserError, match=f"^training.loss: given fused{reason}.* or chunked$"):
        loss_implementation(load_spec("quickstart", ["training.loss=fused"]))
