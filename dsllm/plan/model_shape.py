"""The sizes of a spec's network: exact parameter counts and arithmetic per token, without building it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from dsllm.errors import UserError
from dsllm.plan.config_sizes import config_sizes
from dsllm.spec.derived import config_source, experts, written_config
from dsllm.units import round_up

if TYPE_CHECKING:
    from dsllm.spec.sections import Model, Spec

Style = Literal["gpt2", "llama"]
"""How a block is made: layer norms, biases, learned positions and two feed-forward matrices; or RMS norms, rotary
positions and a gated feed-forward layer of three."""


class Tensor(NamedTuple):
    """A parameter: what the optimizer decays and ZeRO cuts."""

    elements: int
    is_matrix: bool
    is_muons: bool = False
    """Whether it is Muon's, which is a group of its own."""
    smaller_side: int = 0
    """Of a matrix, or of each in a stack of them."""
    stacked: int = 1
    """Matrices in one tensor, as those of experts."""

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Tensor:
        """A vector, a matrix, or where there are more than two sizes a stack of matrices."""
        if len(sizes) < 2:
            return cls(prod(sizes), False)
        return cls(prod(sizes), True, smaller_side=min(sizes[-2:]), stacked=prod(sizes[:-2]))


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything about a network that decides how many numbers it holds, and what a token costs."""

    family: str
    """The model type, as Hugging Face has it."""
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    """Width of a head."""
    intermediate_size: int
    """Width of the feed-forward layer; of one expert where there are several."""
    max_position_embeddings: int
    vocab_size: int
    """Tokens that the tokenizer can produce."""
    padded_vocab_size: int
    """Rows of the embedding and of the output projection."""
    tie_word_embeddings: bool
    has_query_biases: bool = False
    """Whether query, key and value projections have biases where the others have none (qwen2)."""
    norms_queries: bool = False
    """Whether queries and keys pass a norm of their own, a head at a time (qwen3)."""
    num_experts: int = 0
    """Feed-forward layers to choose among; 0 where all tokens take the same one."""
    num_experts_per_token: int = 0
    sliding_window: int | None = None
    """Tokens that attention looks back at most."""

    @property
    def style(self) -> Style:
        return "gpt2" if self.family == "gpt2" else "llama"

    @property
    def activation_slack(self) -> float:
        """What predicted activations are multiplied with, so that none falls short."""
        return 1.0

    @property
    def query_size(self) -> int:
        """Width of the queries of a token, all heads together."""
        return self.num_attention_heads * self.head_size

    @property
    def key_value_size(self) -> int:
        """Width of the keys, and of the values, of a token."""
        return self.num_key_value_heads * self.head_size

    @property
    def parameters(self) -> int:
        """Parameters of the model proper, without the padding of the vocabulary: what a paper would state."""
        return self._total(self.vocab_size)

    @property
    def active_parameters(self) -> int:
        """Those of `parameters` that a token meets: all but the experts that it does not take."""
        passed_over = self.num_experts - self.num_experts_per_token
        return self.parameters - self.num_layers * passed_over * self.expert_parameters

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
        return self.max_position_embeddings * self.hidden_size if self.style == "gpt2" else 0

    @property
    def norm_parameters(self) -> int:
        """One norm: weight and bias of a layer norm, or weight of an RMS norm."""
        return self.hidden_size * (2 if self.style == "gpt2" else 1)

    @property
    def expert_parameters(self) -> int:
        """Matrices of one feed-forward layer: up and down; or gate, up and down."""
        return (2 if self.style == "gpt2" else 3) * self.hidden_size * self.intermediate_size

    @property
    def router_parameters(self) -> int:
        """Of the matrix that chooses experts, in each block."""
        return self.num_experts * self.hidden_size

    @property
    def parameters_per_layer(self) -> int:
        """One transformer block."""
        return sum(tensor.elements for tensor in self.block_tensors)

    @cached_property
    def block_tensors(self) -> tuple[Tensor, ...]:
        """The parameters of one block, in the order of transformers' modules."""
        return tuple(_gpt2_block(self) if self.style == "gpt2" else _llama_block(self))

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every allocated parameter once, in the order of transformers' modules."""
        embedding = Tensor.of((self.embedding_parameters // self.hidden_size, self.hidden_size))
        positions = [Tensor.of((self.max_position_embeddings, self.hidden_size))] if self.position_parameters else []
        head = [] if self.tie_word_embeddings else [embedding]
        return (embedding, *positions, *self.block_tensors * self.num_layers, *_norm(self), *head)

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
    hidden, query, key_value = shape.hidden_size, shape.query_size, shape.key_value_size
    linear = _linear if shape.has_query_biases else _matrix
    inputs = [*linear(hidden, query), *linear(hidden, key_value), *linear(hidden, key_value)]
    norms = [Tensor(shape.head_size, False)] * (2 if shape.norms_queries else 0)
    return [*inputs, *_matrix(query, hidden), *norms, *_gated_feed_forward(shape), *_norm(shape), *_norm(shape)]


def _gated_feed_forward(shape: ModelShape) -> list[Tensor]:
    """Gate, up and down; with experts the router, the gates and ups of all experts as one tensor, and the downs."""
    hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    if not experts:
        return _matrix(hidden, inner) * 3
    return [*_matrix(experts, hidden), Tensor.of((experts, 2 * inner, hidden)), Tensor.of((experts, hidden, inner))]


def _matrix(rows: int, columns: int) -> list[Tensor]:
    return [Tensor.of((rows, columns))]


def _linear(rows: int, columns: int) -> list[Tensor]:
    """A matrix and its bias."""
    return [*_matrix(rows, columns), Tensor(columns, False)]


def _norm(shape: ModelShape) -> list[Tensor]:
    return [Tensor(shape.hidden_size, False)] * (shape.norm_parameters // shape.hidden_size)


def model_shape(spec: Spec) -> ModelShape:
    """The sizes of a spec's network, absent fields filled in.

    Raises UserError for an automatic family whose sizes no formula has: model/shapes.py traces it.
    """
    model = spec.model
    padded_vocab_size = round_up(spec.vocab_size, model.vocab_padding_multiple)
    if model.family == "auto":
        config = written_config(model)
        if not config:
            raise UserError(
                f"model.config: given '{config_source(model)[0]}', no folder here: its sizes are known when it has "
                "been read from the Hub; give a folder that has a config.json, or read it where transformers is"
            )
        sizes = config_sizes(config)
        if sizes is None:
            raise UserError(
                f"model.config: model type {config.get('model_type')}, whose sizes no formula here has: they are "
                "traced, which needs torch; pip install 'dsllm[train]'"
            )
        return ModelShape(**sizes, vocab_size=spec.vocab_size, padded_vocab_size=padded_vocab_size)
    num_experts, num_experts_per_token = experts(model)
    return ModelShape(
        family=model.family,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads or model.num_attention_heads,
        head_size=model.head_size or model.hidden_size // model.num_attention_heads,
        intermediate_size=intermediate_size(model),
        max_position_embeddings=model.max_position_embeddings,
        vocab_size=spec.vocab_size,
        padded_vocab_size=padded_vocab_size,
        tie_word_embeddings=model.tie_word_embeddings,
        has_query_biases=model.family == "qwen2",
        norms_queries=model.family == "qwen3",
        num_experts=num_experts,
        num_experts_per_token=num_experts_per_token,
        sliding_window=model.sliding_window,
    )


def has_formula(spec: Spec) -> bool:
    """Whether `model_shape` knows the sizes of the network."""
    return spec.model.family != "auto" or config_sizes(written_config(spec.model)) is not None


def intermediate_size(model: Model) -> int:
    """Width of the feed-forward layer: 4 x hidden for gpt2, else 8/3 x hidden rounded up to 128, unless given.

    8/3 keeps three matrices at the size of two of 4 x hidden (SwiGLU, arXiv:2002.05202).
    """
    if model.intermediate_size is not None:
        return model.intermediate_size
    return 4 * model.hidden_size if model.family == "gpt2" else round_up(-(-8 * model.hidden_size // 3), 128)


def flops_per_token(shape: ModelShape, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for a token: 6N + 12 x layers x width x sequence.

    N is every parameter of the model proper that a token meets (PaLM, arXiv:2204.02311, appendix B), and the width that
    of the queries. The attention term counts whole rows, or those of the sliding window, as the published utilisations
    do, though half of them are masked; work repeated by activation checkpointing is not counted.
    """
    row = min(sequence_length, shape.sliding_window or sequence_length)
    return 6 * shape.active_parameters + 12 * shape.num_layers * shape.query_size * row
