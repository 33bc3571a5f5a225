"""The sizes of a spec's network: exact parameter counts and arithmetic per token, without building it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from dsllm.units import round_up

if TYPE_CHECKING:
    from dsllm.spec.sections import Model, Spec


class Tensor(NamedTuple):
    """A parameter: what the optimizer decays and ZeRO cuts."""

    elements: int
    is_matrix: bool
    is_muons: bool = False
    """Whether it is Muon's, which is a group of its own."""


@dataclass(frozen=True)
class ModelShape:
    """Everything about a network that decides how many numbers it holds."""

    family: Literal["gpt2", "llama"]
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int
    vocab_size: int
    """Tokens that the tokenizer can produce."""
    padded_vocab_size: int
    """Rows of the embedding and of the output projection."""
    tie_word_embeddings: bool

    @property
    def key_value_size(self) -> int:
        """Width of the keys, and of the values, of a token."""
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads

    @property
    def parameters(self) -> int:
        """Parameters of the model proper, without the padding of the vocabulary: what a paper would state."""
        return self._total(self.vocab_size)

    @property
    def allocated_parameters(self) -> int:
        """Parameters that take memory, the padding of the vocabulary included."""
        return self._total(self.padded_vocab_size)

    @property
    def embedding_parameters(self) -> int:
        """Allocated parameters of the token embedding."""
        return self.padded_vocab_size * self.hidden_size

    @property
    def position_parameters(self) -> int:
        """Learned positions; rotary ones have no parameters."""
        return self.max_position_embeddings * self.hidden_size if self.family == "gpt2" else 0

    @property
    def norm_parameters(self) -> int:
        """One norm: weight and bias of a layer norm, or weight of an RMS norm."""
        return self.hidden_size * (2 if self.family == "gpt2" else 1)

    @property
    def attention_parameters(self) -> int:
        """Query, key, value and output projections of a block; with biases in gpt2."""
        query_and_output = 2 * self.hidden_size**2
        key_and_value = 2 * self.hidden_size * self.key_value_size
        biases = 4 * self.hidden_size if self.family == "gpt2" else 0
        return query_and_output + key_and_value + biases

    @property
    def feed_forward_parameters(self) -> int:
        """Up and down projections with biases in gpt2; gate, up and down projections in llama."""
        if self.family == "gpt2":
            return 2 * self.hidden_size * self.intermediate_size + self.intermediate_size + self.hidden_size
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def parameters_per_layer(self) -> int:
        """One transformer block."""
        return self.attention_parameters + self.feed_forward_parameters + 2 * self.norm_parameters

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every allocated parameter once, in the order of transformers' modules."""
        embedding = Tensor(self.embedding_parameters, True)
        positions = [Tensor(self.position_parameters, True)] if self.position_parameters else []
        head = [] if self.tie_word_embeddings else [embedding]
        block = _gpt2_block(self) if self.family == "gpt2" else _llama_block(self)
        return (embedding, *positions, *block * self.num_layers, *_norm(self), *head)

    def _total(self, vocabulary_rows: int) -> int:
        vocabulary_matrices = 1 if self.tie_word_embeddings else 2
        return (
            vocabulary_matrices * vocabulary_rows * self.hidden_size
            + self.position_parameters
            + self.num_layers * self.parameters_per_layer
            + self.norm_parameters
        )


def _gpt2_block(shape: ModelShape) -> list[Tensor]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    attention = [*_linear(hidden, 3 * hidden), *_linear(hidden, hidden)]
    return [*_norm(shape), *attention, *_norm(shape), *_linear(hidden, inner), *_linear(inner, hidden)]


def _llama_block(shape: ModelShape) -> list[Tensor]:
    hidden, key_value, inner = shape.hidden_size, shape.key_value_size, shape.intermediate_size
    attention = [Tensor(hidden * width, True) for width in (hidden, key_value, key_value, hidden)]
    return [*attention, *[Tensor(hidden * inner, True)] * 3, *_norm(shape), *_norm(shape)]


def _linear(rows: int, columns: int) -> list[Tensor]:
    """A matrix and its bias."""
    return [Tensor(rows * columns, True), Tensor(columns, False)]


def _norm(shape: ModelShape) -> list[Tensor]:
    return [Tensor(shape.hidden_size, False)] * (shape.norm_parameters // shape.hidden_size)


def model_shape(spec: Spec) -> ModelShape:
    """The sizes of a spec's network, absent fields filled in."""
    model = spec.model
    return ModelShape(
        family=model.family,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads or model.num_attention_heads,
        intermediate_size=intermediate_size(model),
        max_position_embeddings=model.max_position_embeddings,
        vocab_size=spec.vocab_size,
        padded_vocab_size=round_up(spec.vocab_size, model.vocab_padding_multiple),
        tie_word_embeddings=model.tie_word_embeddings,
    )


def intermediate_size(model: Model) -> int:
    """Width of the feed-forward layer: 4 x hidden for gpt2, 8/3 x hidden rounded up to 128 for llama, unless given.

    8/3 keeps three matrices at the size of two of 4 x hidden (SwiGLU, arXiv:2002.05202).
    """
    if model.intermediate_size is not None:
        return model.intermediate_size
    return 4 * model.hidden_size if model.family == "gpt2" else round_up(-(-8 * model.hidden_size // 3), 128)


def flops_per_token(shape: ModelShape, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for a token: 6N + 12 x layers x width x sequence.

    N is every parameter of the model proper (PaLM, arXiv:2204.02311, appendix B). The attention term counts whole
    rows, as the published utilisations do, though half of them are masked; work repeated by activation checkpointing
    is not counted.
    """
    return 6 * shape.parameters + 12 * shape.num_layers * shape.hidden_size * sequence_length
