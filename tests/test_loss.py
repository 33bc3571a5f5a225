"""Cross-entropy in pieces is cross-entropy, and takes little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from dsllm.data.samples import IGNORED_LABEL
from dsllm.model import loss as loss_module
from dsllm.model.build import build_model, model_config
from dsllm.model.initialize import initialize_weights
from dsllm.model.loss import LossHead, TrainingModel, chunked_cross_entropy
from dsllm.plan.workload import LossImplementation
from dsllm.spec.load import load_spec

WIDTH = 16


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece holds the logits of a few tokens only."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS_BYTES", 1000)


def inputs(tokens: int, vocab_size: int, ignored: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Hidden states (tokens, WIDTH), weight (vocab_size, WIDTH), labels (tokens,), a share of them left out.

    Logits are of order 1.
    """
    generator = torch.Generator().manual_seed(tokens * 1000 + vocab_size)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, WIDTH, generator=generator) / WIDTH**0.5).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (tokens,), generator=generator)
    left_out = torch.rand(tokens, generator=generator) < ignored
    return hidden, weight, labels.masked_fill(left_out, IGNORED_LABEL)


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(linear(hidden, weight).float(), labels)


def chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over the counted labels, as the plain one is."""
    return chunked_cross_entropy(hidden, weight, labels, (labels != IGNORED_LABEL).sum().clamp(min=1))


def loss_and_gradients(function: Any, hidden: Any, weight: Any, labels: Any) -> tuple[torch.Tensor, ...]:
    loss = function(hidden, weight, labels)
    return loss.detach(), *torch.autograd.grad(loss / 2, (hidden, weight))  # as accumulation scales a loss


def assert_equal_to_plain(arguments: tuple[Any, ...]) -> None:
    expected = loss_and_gradients(plain, *arguments)
    found = loss_and_gradients(chunked, *arguments)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@given(tokens=st.integers(1, 70), vocab_size=st.integers(2, 300), ignored=st.sampled_from([0.0, 0.3]))
@settings(max_examples=60, deadline=None)
def test_loss_and_gradients_equal_the_plain_ones_for_any_sizes(tokens: int, vocab_size: int, ignored: float) -> None:
    arguments = inputs(tokens, vocab_size, ignored)
    if bool((arguments[2] == IGNORED_LABEL).all()):
        return
    with pytest.MonkeyPatch.context() as patch:
        for piece_bytes in (1, 4 * vocab_size * 7 + 3, 2**30):
            patch.setattr(loss_module, "CHUNK_LOGITS_BYTES", piece_bytes)
            assert_equal_to_plain(arguments)


@pytest.mark.usefixtures("small_pieces")
def test_loss_and_gradients_equal_the_plain_ones_in_many_pieces() -> None:
    for tokens, vocab_size, ignored in ((64, 100, 0.0), (1, 100, 0.0), (61, 97, 0.5), (2, 2, 0.0)):
        assert_equal_to_plain(inputs(tokens, vocab_size, ignored))


@pytest.mark.parametrize("implementation", ["chunked", "plain"])
@pytest.mark.parametrize("loss_tokens", [None, 7.0])
@pytest.mark.usefixtures("small_pieces")
def test_without_a_single_counted_label_the_loss_and_its_gradients_are_zero(
    implementation: LossImplementation, loss_tokens: float | None
) -> None:
    hidden, weight, labels = inputs(33, 50)
    head = head_of(weight, implementation)
    loss = head(hidden.unsqueeze(0), torch.full_like(labels, IGNORED_LABEL).unsqueeze(0), scalar(loss_tokens))
    gradients = torch.autograd.grad(loss, (hidden, head.weight))
    assert all(torch.count_nonzero(tensor) == 0 for tensor in (loss, *gradients))


@pytest.mark.parametrize("implementation", ["chunked", "plain"])
@given(counted=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_micro_batches_over_their_share_of_the_tokens_average_to_the_loss_of_all_of_them(
    implementation: LossImplementation, counted: list[int], seed: int
) -> None:
    """However unevenly padding is spread: DeepSpeed takes the mean over micro-batches and ranks."""
    if sum(counted) == 0:
        return
    hidden, weight, labels = inputs(6 * len(counted), 50 + seed)
    for micro_batch, number in enumerate(counted):
        labels[6 * micro_batch + number : 6 * micro_batch + 6] = IGNORED_LABEL
    expected = loss_and_gradients(plain, hidden, weight, labels)

    head = head_of(weight, implementation)
    micro_batches = zip(hidden.split(6), labels.split(6), strict=True)
    share = scalar(sum(counted) / len(counted))
    losses = [head(states.unsqueeze(0), targets.unsqueeze(0), share) for states, targets in micro_batches]
    mean = torch.stack(losses).mean()
    found = (mean.detach(), *torch.autograd.grad(mean / 2, (hidden, head.weight)))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("small_pieces")
def test_without_gradients_the_loss_is_the_same_and_nothing_is_kept() -> None:
    arguments = inputs(33, 50, ignored=0.2)
    with torch.no_grad():
        loss = chunked(*arguments)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(*arguments).detach())


@pytest.mark.usefixtures("small_pieces")
def test_a_frozen_weight_gets_no_gradient_and_does_not_disturb_that_of_the_states() -> None:
    hidden, weight, labels = inputs(33, 50)
    (expected,) = torch.autograd.grad(plain(hidden, weight, labels), hidden)
    chunked(hidden, weight.detach(), labels).backward()
    torch.testing.assert_close(hidden.grad, expected, atol=1e-6, rtol=1e-6)
    assert weight.grad is None


@pytest.mark.usefixtures("small_pieces")
def test_bf16_is_as_close_to_fp32_as_the_plain_loss_is() -> None:
    exact = loss_and_gradients(plain, *(as_fp32(tensor) for tensor in inputs(200, 150, 0.2, torch.bfloat16)))
    found = loss_and_gradients(chunked, *inputs(200, 150, 0.2, torch.bfloat16))
    usual = loss_and_gradients(plain, *inputs(200, 150, 0.2, torch.bfloat16))
    for ours, theirs, truth in zip(found, usual, exact, strict=True):
        assert distance(ours, truth) <= max(1.5 * distance(theirs, truth), 1e-6)
        assert distance(ours, truth) < 0.02


def test_fp16_gradients_of_a_long_batch_neither_underflow_nor_overflow() -> None:
    # Each logit's gradient is about 1 / (tokens x vocabulary): 5e-8 here, below fp16's smallest number of 6e-8.
    hidden, weight, labels = inputs(20_000, 1000, dtype=torch.float16)
    small = (hidden.detach() * 0.01).requires_grad_()
    scale = 2.0**16  # as DeepSpeed scales the loss of fp16
    loss = chunked(small, weight, labels)
    found = torch.autograd.grad(loss * scale, (small, weight))
    exact = [as_fp32(tensor) for tensor in (small, weight, labels)]
    expected = torch.autograd.grad(plain(*exact) * scale, exact[:2])
    for ours, truth in zip(found, expected, strict=True):
        assert torch.isfinite(ours).all()
        assert distance(ours, truth) < 0.02


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.usefixtures("small_pieces")
def test_a_whole_model_has_the_loss_and_the_gradients_that_transformers_computes(family: str, tied: bool) -> None:
    ids = torch.randint(500, (3, 33), generator=torch.Generator().manual_seed(0))
    theirs = small_model(family, tied)
    # transformers shifts the labels itself: position i is scored by the label at i + 1
    expected = theirs(input_ids=ids, labels=ids).loss
    expected.backward()
    ours = TrainingModel(small_model(family, tied), "chunked")
    found = ours(input_ids=ids[:, :-1], labels=ids[:, 1:].contiguous())
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    gradients = {name.removeprefix("causal_lm."): parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_plain_head_and_the_chunked_one_agree() -> None:
    hidden, weight, labels = inputs(24, 50, ignored=0.2)
    shaped = (hidden.view(4, 6, WIDTH), labels.view(4, 6))
    in_chunks, plainly = (head_of(weight, kind)(*shaped) for kind in ("chunked", "plain"))
    torch.testing.assert_close(in_chunks, plainly, atol=1e-6, rtol=1e-6)


def test_the_fused_loss_is_a_sum_over_the_given_tokens() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    if not torch.cuda.is_available():
        pytest.skip("liger-kernel's loss needs a CUDA device, and there is none")
    hidden, weight, labels = (tensor.cuda() for tensor in inputs(24, 50, ignored=0.2))
    shaped = (hidden.view(4, 6, WIDTH), labels.view(4, 6), torch.tensor(7.0, device="cuda"))
    fused, plainly = (head_of(weight, kind)(*shaped) for kind in ("fused", "plain"))
    torch.testing.assert_close(fused, plainly, atol=1e-4, rtol=1e-4)


def test_an_output_projection_with_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="an output projection with a bias has no chunked loss here"):
        LossHead(torch.nn.Linear(4, 4), "chunked")


@pytest.mark.parametrize("tokens", [1, 3, 11, 64, 1000])
def test_no_logits_are_larger_than_a_piece(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS_BYTES", 5 * 500 * 4 + 1500)  # five tokens and three quarters
    arguments = inputs(tokens, 500)
    with LargestLogits(500) as logits:
        chunked(*arguments).backward()
    assert 0 < logits.largest_bytes <= 5 * 500 * 4


class LargestLogits(TorchDispatchMode):
    """Watches every operation for the largest result of (tokens, vocabulary)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.largest_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_transposed_weight = isinstance(result, torch.Tensor) and result.shape == (WIDTH, self.vocab_size)
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (self.vocab_size,) and not is_transposed_weight:
            self.largest_bytes = max(self.largest_bytes, result.nbytes)
        return result


def small_model(family: str, tied: bool) -> torch.nn.Module:
    shape = "num_layers: 2, hidden_size: 32, num_attention_heads: 4, max_position_embeddings: 64"
    spec = load_spec(
        "quickstart",
        [
            f"model={{family: {family}, {shape}, tie_word_embeddings: {str(tied).lower()}}}",
            "tokenizer={kind: bpe, vocab_size: 500}",
            "batch.sequence_length=64",
        ],
    )
    model = build_model(model_config(spec), torch.float32)
    initialize_weights(model, spec.seed)
    return model


def head_of(weight: torch.Tensor, implementation: LossImplementation) -> LossHead:
    """A head with a copy of the weight."""
    projection = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.weight = torch.nn.Parameter(weight.detach().clone())
    return LossHead(projection, implementation)


def scalar(number: float | None) -> torch.Tensor | None:
    return None if number is None else torch.tensor(number)


def as_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().requires_grad_() if tensor.is_floating_point() else tensor


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((found.float() - truth).norm() / truth.norm())
