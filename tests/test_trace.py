"""The trace holds what a real run holds, of any causal language model; the arithmetic says the same."""

from __future__ import annotations

import functools
import json
import resource
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from dsllm.engine import start
from dsllm.engine.allocators import allocator
from dsllm.errors import UserError
from dsllm.model.build import DTYPES, build_model, enable_activation_checkpointing, model_config
from dsllm.model.cuda_kernels import flash_backward_workspace_bytes
from dsllm.model.ledger import Ledger
from dsllm.model.loss import TrainingModel
from dsllm.model.trace import Device, Trace, config_of, differences, trace, traced_shape
from dsllm.plan.activations import activations
from dsllm.plan.memory import estimate_memory
from dsllm.plan.model_shape import model_shape
from dsllm.plan.workload import Workload, workload
from dsllm.spec.load import load_spec, preset_names
from dsllm.spec.sections import Spec
from dsllm.units import MIB

TOLERANCE = 0.03
CHECKPOINTING = ["none", "selective", "full"]
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
QWEN3_600M = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN2_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
OTHER_TYPES = pytest.mark.parametrize("config_type", [MistralConfig, Qwen2Config, Qwen3Config, PhiConfig, Phi3Config])


# --- against real tensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Bytes that torch's CPU allocator held for a micro-batch, the model included."""

    saved_bytes: int
    """When forward reaches the loss, the model left out and the hidden states as well."""
    forward_peak_bytes: int
    backward_peak_bytes: int


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "checkpointing", "loss", "dropout", "attention"),
    [
        ("gpt2", "none", "chunked", 0.0, "sdpa"),
        ("gpt2", "none", "plain", 0.1, "sdpa"),
        ("gpt2", "full", "chunked", 0.1, "eager"),
        ("llama", "none", "chunked", 0.0, "eager"),
        ("llama", "selective", "plain", 0.0, "sdpa"),
        ("llama", "full", "chunked", 0.0, "sdpa"),
    ],
)
def test_a_trace_holds_what_real_tensors_hold(
    family: str, checkpointing: str, loss: str, dropout: float, attention: str, precision: str
) -> None:
    spec = tiny_spec(family, checkpointing, loss, dropout, precision, attention)
    # sequences enough that the state of the random generator, which checkpointing keeps on the CPU, is below 1 %
    found, measured = traced(spec, 8, "cpu"), measure(spec, 8)
    assert found.activations.saved_bytes == pytest.approx(measured.saved_bytes, rel=0.01)
    assert found.forward_peak_bytes == pytest.approx(measured.forward_peak_bytes, rel=0.01)
    assert found.backward_peak_bytes == pytest.approx(measured.backward_peak_bytes, rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "checkpointing", "dropout", "attention"),
    [
        ("gpt2", "none", 0.0, "sdpa"),
        ("gpt2", "full", 0.1, "sdpa"),
        ("gpt2", "none", 0.0, "eager"),
        ("llama", "none", 0.0, "sdpa"),
        ("llama", "selective", 0.0, "sdpa"),
    ],
)
def test_a_trace_with_documents_masked_holds_what_real_tensors_hold(
    family: str, checkpointing: str, dropout: float, attention: str, precision: str
) -> None:
    spec = tiny_spec(family, checkpointing, "chunked", dropout, precision, attention, "data.mask_documents=true")
    found, measured = traced(spec, 8, "cpu"), measure(spec, 8)
    assert found.activations.saved_bytes == pytest.approx(measured.saved_bytes, rel=0.01)
    assert found.forward_peak_bytes == pytest.approx(measured.forward_peak_bytes, rel=0.01)
    assert found.backward_peak_bytes == pytest.approx(measured.backward_peak_bytes, rel=0.01)


def test_a_ledger_counts_shared_storage_once_and_what_died_no_more() -> None:
    ledger = Ledger("cpu")
    with ledger:
        kept = torch.ones(1000)
        view = kept[10:].view(-1)
        between = ledger.moment()
        torch.ones(500).add_(1)
        after = ledger.moment()
    assert view.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()
    assert ledger.held_bytes(between) == ledger.held_bytes(after) == 4000
    assert ledger.peak_bytes(0, after) == 6000
    assert ledger.peak_bytes(0, after, without=ledger.add([kept])) == 2000


def test_cuda_hands_out_multiples_of_512_bytes() -> None:
    ledger = Ledger("cuda")
    with ledger:
        kept = [torch.ones(1), torch.ones(128), torch.ones(129)]
    assert len(kept) == 3
    assert ledger.held_bytes(ledger.moment()) == 512 + 512 + 1024


# --- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", preset_names())
def test_a_trace_counts_the_tensors_of_the_plan(preset: str) -> None:
    spec = load_spec(preset)
    planned, found = model_shape(spec), traced_shape(model_config(spec))
    assert found.tensors == planned.tensors
    assert found.parameters == planned.allocated_parameters
    assert found.parameters_per_layer == planned.parameters_per_layer
    assert found.embedding_parameters == planned.embedding_parameters
    shared = ("num_layers", "hidden_size", "num_key_value_heads", "intermediate_size", "tie_word_embeddings", "family")
    assert [getattr(found, name) for name in shared] == [getattr(planned, name) for name in shared]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("preset", preset_names())
def test_arithmetic_and_trace_agree_on_every_preset(preset: str, device: Device) -> None:
    assert_agree(load_spec(preset), 4, device)


@pytest.mark.parametrize("loss", ["chunked", "plain"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("preset", ["gpt2-124m", "lillm-39m", "llama-248m", "quickstart"])
def test_arithmetic_and_trace_agree_whatever_is_kept(preset: str, checkpointing: str, loss: str) -> None:
    overrides = [f"training.activation_checkpointing={checkpointing}", f"training.loss={loss}"]
    assert_agree(load_spec(preset, overrides), 8, "cpu")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("overrides", [["model.dropout=0.1"], ["model.attention=eager"], ["training.precision=fp16"]])
def test_arithmetic_and_trace_agree_on_other_kernels(overrides: list[str], device: Device) -> None:
    assert_agree(load_spec("gpt2-124m", overrides), 2, device)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("gpt2-124m", []),
        ("gpt2-124m", ["training.activation_checkpointing=full"]),
        ("gpt2-124m", ["model.dropout=0.1", "training.activation_checkpointing=selective"]),
        ("gpt2-124m", ["model.attention=eager", "training.activation_checkpointing=full"]),
        ("gpt2-124m", ["batch.sequence_length=1001"]),
        ("llama-248m", []),
        ("llama-248m", ["training.activation_checkpointing=full"]),
        ("llama-248m", ["training.precision=fp32"]),
        ("quickstart", []),
    ],
)
def test_arithmetic_and_trace_agree_where_documents_are_masked(
    preset: str, overrides: list[str], device: Device
) -> None:
    assert_agree(load_spec(preset, ["data.mask_documents=true", *overrides]), 4, device)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_estimate_from_a_trace_is_that_of_the_arithmetic(stage: int) -> None:
    spec = load_spec("gpt2-124m")
    run, found = workload(spec).at_stage(stage), traced(spec, 4, "cuda")
    expected = estimate_memory(run, 2, 4).peak.total_bytes
    of_trace = estimate_memory(replace(run, shape=found.shape), 2, 4, traced=found.activations).peak.total_bytes
    assert of_trace == pytest.approx(expected, rel=TOLERANCE)


def test_seven_billion_parameters_are_traced_without_their_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = trace(model_config(load_spec("llama-7b")), workload(load_spec("llama-7b")), 8, "cuda")
    assert found.backward_peak_bytes > 25 * 1024 * MIB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # KiB


# --- other models -----------------------------------------------------------------------------------------------------


@OTHER_TYPES
@pytest.mark.parametrize("loss", ["chunked", "plain"])
def test_other_models_trace_without_code_of_their_own(config_type: type[PretrainedConfig], loss: str) -> None:
    config = config_type(**SMALL)
    runs = [replace(tiny_run(), activation_checkpointing=kind, loss=loss) for kind in CHECKPOINTING]
    none, selective, full = (trace(config, run, 4, "cuda").activations for run in runs)
    assert none.saved_bytes > selective.saved_bytes > full.saved_bytes > 0
    assert min(min(asdict(found).values()) for found in (none, full)) > 0
    assert full.block_backward_bytes > none.block_backward_bytes


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (MistralConfig(), 7_241_732_096),
        (Qwen2Config(**QWEN2_7B), 7_615_616_512),
        (Qwen3Config(**QWEN3_600M), 596_049_920),
        (PhiConfig(), 1_418_270_720),
        (Phi3Config(), 3_821_079_552),
    ],
    ids=["mistral-7b", "qwen2.5-7b", "qwen3-0.6b", "phi-1", "phi-3-mini"],
)
def test_other_models_have_their_published_parameters(config: PretrainedConfig, parameters: int) -> None:
    assert traced_shape(config).parameters == parameters


@pytest.mark.parametrize(
    "config", [MistralConfig(), Qwen3Config(**QWEN3_600M), PhiConfig()], ids=["mistral-7b", "qwen3-0.6b", "phi-1"]
)
def test_other_models_trace_at_their_real_size(config: PretrainedConfig) -> None:
    run = replace(tiny_run(), sequence_length=2048, activation_checkpointing="full")
    found = trace(config, run, 2, "cuda")
    boundaries = 2 * 2 * 2048 * config.hidden_size * config.num_hidden_layers
    assert boundaries < found.activations.saved_bytes < 1.2 * boundaries
    assert found.backward_peak_bytes > 4 * found.shape.parameters
    assert estimate_memory(replace(run, shape=found.shape), 8, 2, traced=found.activations).parameters == (
        found.shape.parameters
    )


def test_mistral_without_its_window_holds_what_llama_holds() -> None:
    mistral = trace(MistralConfig(**SMALL, sliding_window=None), tiny_run(), 4, "cuda")
    llama = trace(LlamaConfig(**SMALL), tiny_run(), 4, "cuda")
    assert replace(mistral, shape=replace(mistral.shape, family="llama")) == llama


def test_attention_within_a_window_keeps_a_mask() -> None:
    whole, windowed = (
        trace(MistralConfig(**SMALL, sliding_window=window), tiny_run(), 4, "cuda").activations.saved_bytes
        for window in (None, 16)
    )
    assert windowed > whole


def test_a_trace_leaves_the_config_as_it_was() -> None:
    config = Qwen2Config(**SMALL)
    before = config.to_dict()
    trace(config, replace(tiny_run(), attention="eager"), 1, "cpu")
    assert config.to_dict() == before
    assert config._attn_implementation is None


# --- CUDA's kernels ---------------------------------------------------------------------------------------------------


def test_dropout_keeps_a_byte_an_element_on_cuda_and_the_element_itself_on_the_cpu() -> None:
    def config(dropout: float) -> GPT2Config:
        return gpt2(64, 4, resid_pdrop=dropout, embd_pdrop=dropout)

    def more(device: Device) -> int:
        kept, without = (trace(config(p), tiny_run(), 4, device).activations.saved_bytes for p in (0.1, 0.0))
        return kept - without

    elements = (1 + 2 * 4) * 4 * 64 * 64  # of the embedding, and of two branches of four blocks
    assert more("cuda") == elements
    assert more("cpu") == 2 * elements


def test_flash_attention_pads_heads_to_a_multiple_of_8() -> None:
    def kept_per_block(width: int) -> int:
        one, two = (trace(gpt2(2 * width, layers), tiny_run(), 4, "cuda").activations.saved_bytes for layers in (1, 2))
        return two - one

    def by_hand(width: int, padded: int) -> int:
        """Two norms with input and output, the projection's input, GELU's input and output; query, key and value; and,
        where the projection's input is not that itself, attention's output."""
        own_output = padded if padded != width else 0
        numbers = (4 + 1 + 8) * width + 3 * padded + own_output
        return 4 * 64 * 2 * 2 * numbers

    statistics = kept_per_block(64) - by_hand(64, 64)
    assert kept_per_block(60) == by_hand(60, 64) + statistics


def test_the_workspace_of_flash_attention_by_hand() -> None:
    query, key = torch.empty(2, 6, 100, 50), torch.empty(2, 3, 100, 50)
    half = torch.bfloat16
    # 100 tokens are 128 rows, and 50 numbers 64, in fp32, with a sum for each row
    accumulated = 2 * 6 * 128 * (64 + 1) * 4
    assert flash_backward_workspace_bytes(query.to(half), query.to(half)) == accumulated
    # keys and values for each of the six heads
    assert flash_backward_workspace_bytes(query.to(half), key.to(half)) == accumulated + 2 * (2 * 6 * 100 * 50) * 2


# --- differences and bad input ----------------------------------------------------------------------------------------


def test_differences_are_relative_to_the_trace() -> None:
    @dataclass(frozen=True)
    class Sizes:
        first: int
        second: int
        third: int

    assert differences(Sizes(103, 0, 5), Sizes(100, 0, 0)) == {
        "first": pytest.approx(0.03),
        "second": 0.0,
        "third": float("inf"),
    }


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_config_is_read_from_its_folder_or_its_file(tmp_path: Path, is_folder: bool) -> None:
    Qwen2Config(**SMALL).save_pretrained(tmp_path)
    config = config_of(tmp_path if is_folder else tmp_path / "config.json")
    assert (config.model_type, config.hidden_size) == ("qwen2", 64)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json there; give a Hugging Face model's folder"):
        config_of(tmp_path)


@pytest.mark.parametrize("content", ['{"model_type": "no-such-model"}', "{}", "{", "[1]", '"text"'])
def test_a_config_of_an_unknown_type_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="not a config that this transformers can read") as caught:
        config_of(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [BertConfig(), T5Config()], ids=["encoder", "encoder-decoder"])
def test_what_is_no_causal_model_is_refused(tmp_path: Path, config: PretrainedConfig) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": config.model_type}))
    with pytest.raises(UserError, match=f"model type {config.model_type} is no decoder that predicts the next token"):
        config_of(tmp_path)
    with pytest.raises(UserError, match="is no decoder"):
        trace(config, tiny_run(), 1, "cpu")


def test_the_fused_loss_is_refused() -> None:
    with pytest.raises(UserError, match="given fused, whose kernels cannot be traced"):
        trace(LlamaConfig(**SMALL), replace(tiny_run(), loss="fused"), 1, "cpu")


# --- helpers ----------------------------------------------------------------------------------------------------------


def assert_agree(spec: Spec, micro_batch_size: int, device: Device) -> None:
    arithmetic = activations(workload(spec), micro_batch_size, device)
    found = differences(arithmetic, traced(spec, micro_batch_size, device).activations)
    assert {term: f"{more:+.1%}" for term, more in found.items() if abs(more) > TOLERANCE} == {}


@functools.cache
def traced(spec: Spec, micro_batch_size: int, device: Device) -> Trace:
    return trace(model_config(spec), workload(spec), micro_batch_size, device)


def tiny_spec(
    family: str, checkpointing: str, loss: str, dropout: float, precision: str, attention: str, *overrides: str
) -> Spec:
    sizes = "num_layers: 4, hidden_size: 128, num_attention_heads: 4, max_position_embeddings: 256"
    return load_spec(
        "quickstart",
        [
            f"model={{family: {family}, {sizes}}}",
            *([f"model.dropout={dropout}"] if dropout else []),
            f"training.activation_checkpointing={checkpointing}",
            f"training.loss={loss}",
            f"training.precision={precision}",
            f"model.attention={attention}",
            *overrides,
        ],
    )


def gpt2(width: int, layers: int, **dropout: float) -> GPT2Config:
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(
        vocab_size=512,
        n_positions=64,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        activation_function="gelu_pytorch_tanh",
        **{**none, **dropout},
    )


def tiny_run() -> Workload:
    return replace(workload(load_spec("quickstart")), sequence_length=64, precision="bf16")


def measure(spec: Spec, micro_batch_size: int) -> Measured:
    """One forward and backward on real tensors, no dispatch mode looking on."""
    counter = allocator("cpu")
    if counter is None:
        pytest.skip("no compiler for the allocator's counter")
    before = counter.read().held_bytes
    model = real_model(spec)
    static = counter.read().held_bytes
    saved: list[int] = []

    def on_loss(head: torch.nn.Module, args: tuple[Any, ...]) -> None:
        saved.append(counter.read().held_bytes - static - args[0].untyped_storage().nbytes())

    model.causal_lm.get_output_embeddings().register_forward_pre_hook(on_loss)
    ids = torch.randint(4096, (micro_batch_size, spec.batch.sequence_length))
    counter.reset_peak()
    position_ids = torch.arange(ids.shape[1]).remainder(50).expand_as(ids) if workload(spec).masks_documents else None
    # oneDNN's products take scratch memory where the CPU has instructions for bf16: no tensor holds it.
    with torch.backends.mkldnn.flags(enabled=False):
        loss = model(ids, ids.clone(), position_ids)
        forward_peak = counter.read().peak_bytes - before
        counter.reset_peak()
        loss.backward()
    return Measured(saved[0], forward_peak, counter.read().peak_bytes - before)


def real_model(spec: Spec) -> TrainingModel:
    causal_lm = build_model(model_config(spec), DTYPES[spec.training.precision])
    with torch.no_grad():
        for weight in causal_lm.parameters():
            weight.normal_(std=0.02)
    if spec.training.activation_checkpointing != "none":
        enable_activation_checkpointing(causal_lm, start.CHECKPOINTED_BLOCKS[spec.training.activation_checkpointing])
    return TrainingModel(causal_lm, workload(spec).loss).train()
