"""The spec: what to train, in one frozen and closed tree.

Pure by design: no torch, no environment, no file access. The docstring under a field is its documentation, its
description in `dsllm schema`, and what the error messages quote. World size is never a field: it is an argument of
whatever needs it, because the same spec must mean the same optimisation on any number of GPUs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dsllm.errors import SpecError
from dsllm.spec.derived import train_steps, vocab_size
from dsllm.spec.rules import broken_rules

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
OffloadDevice = Literal["none", "cpu", "nvme"]
Precision = Literal["bf16", "fp16", "fp32"]
LABEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Section(BaseModel):
    """Common to every part of the spec: immutable, no unknown keys, documented by attribute docstrings.

    Strict, because nothing that the user wrote is rewritten: `true` is not 1 and "8" is not 8. Only sequences may be
    lists or tuples, since YAML knows no tuples.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Scratch(Section):
    """Weights drawn at random."""

    kind: Literal["scratch"] = "scratch"
    """Marks random weights."""


class Pretrained(Section):
    """Weights of a model that exists: pre-training goes on, with its layers or with others made from them."""

    kind: Literal["pretrained"]
    """Marks an existing model."""
    name: str
    """A Hugging Face folder, such as `dsllm export` and `dsllm grow` write, or a name on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    layers: str | None = None
    """Which of its layers, counted from 0, become those of the model, in order: "0-7,4-11" makes 16 of 12 (depth
    up-scaling), "0-4,7-11" makes 10. All when absent."""


Init = Annotated[Scratch | Pretrained, Field(discriminator="kind")]


class ModelSection(Section):
    """What every model has."""

    family: str
    """The architecture; each kind of model says which."""
    init: Init = Scratch()
    """The weights that training starts from."""
    vocab_size: PositiveInt | None = None
    """Tokens the model knows; that of the tokenizer when absent."""
    vocab_padding_multiple: PositiveInt = 128
    """The embedding's rows are rounded up to a multiple of this, which matrix kernels like; 1 switches it off."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel: torch's fused scaled-dot-product attention, or the plain one."""


class Model(ModelSection):
    """The shape of the network."""

    family: Literal["gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral"]
    """Architecture, built from transformers' own classes; `auto` takes any of its configurations."""
    num_layers: PositiveInt
    """Transformer blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_attention_heads: PositiveInt
    """Query heads; they divide `hidden_size`, unless `head_size` is given."""
    num_key_value_heads: PositiveInt | None = None
    """Key and value heads (grouped queries, not in gpt2); as many as the query heads when absent."""
    head_size: PositiveInt | None = None
    """Width of an attention head (not in gpt2 and qwen2); hidden_size / num_attention_heads when absent."""
    intermediate_size: PositiveInt | None = None
    """Width of the feed-forward layer, of each expert in mixtral. When absent: 4 x hidden for gpt2; 8/3 x hidden,
    rounded up to 128, for the others."""
    max_position_embeddings: PositiveInt = 1024
    """Longest sequence the model can read."""
    tie_word_embeddings: bool = True
    """Whether the output projection shares the embedding's weights."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout of embeddings, attention and residuals (gpt2 only); 0 for pre-training."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding (not in gpt2)."""
    sliding_window: PositiveInt | None = None
    """Tokens that attention looks back at most (mistral and mixtral); all when absent."""
    num_experts: PositiveInt | None = None
    """Feed-forward layers to choose among, for each token and block (mixtral); 8 when absent."""
    num_experts_per_token: PositiveInt | None = None
    """Experts that each token takes (mixtral); 2 when absent."""
    balance_loss_weight: NonNegativeFloat = 0.01
    """Weight of the loss that keeps experts equally busy, beside cross-entropy (mixtral)."""
    norm_epsilon: PositiveFloat = 1e-5
    """Epsilon of the layer norms."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights; residual projections get it divided by sqrt(2 x layers)."""


class AutoModel(ModelSection):
    """Any causal language model that transformers has."""

    family: Literal["auto"]
    """Marks a model that is described by a configuration of transformers."""
    config: str | dict[str, Any] | None = None
    """The configuration: a folder that has a config.json, a name on the Hub, or its keys written out here, `model_type`
    among them; that of `init` when absent."""


AnyModel = Annotated[Model | AutoModel, Field(discriminator="family")]


class PretrainedTokenizer(Section):
    """A tokenizer that exists: a Hugging Face folder or Hub name."""

    kind: Literal["pretrained"]
    """Marks a pretrained tokenizer."""
    name: str
    """A folder, or a name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    """Whether code that the Hub repository brings may run. Only for repositories that you have read."""


class SentencePieceTokenizer(Section):
    """A sentencepiece vocabulary, trained on the run's own text."""

    kind: Literal["sentencepiece"]
    """Marks a sentencepiece tokenizer."""
    vocab_size: Annotated[int, Field(ge=300)] = 8192
    """Tokens in the vocabulary; 256 of them are bytes, so that any text can be written."""
    algorithm: Literal["bpe", "unigram"] = "bpe"
    """How the vocabulary is found."""
    training_bytes: PositiveInt = 50_000_000
    """Text to train on at most, taken in equal parts from the start of every source."""


class BpeTokenizer(Section):
    """A byte-level BPE vocabulary like GPT-2's, trained on the run's own text with `tokenizers`."""

    kind: Literal["bpe"]
    """Marks a byte-level BPE tokenizer."""
    vocab_size: Annotated[int, Field(ge=300)] = 8192
    """Tokens in the vocabulary; 256 of them are bytes, so that any text can be written."""
    training_bytes: PositiveInt = 50_000_000
    """Text to train on at most, taken in equal parts from the start of every source."""


Tokenizer = Annotated[PretrainedTokenizer | SentencePieceTokenizer | BpeTokenizer, Field(discriminator="kind")]


class SourceSection(Section):
    """What every source has."""

    label: Annotated[str, Field(pattern=LABEL_PATTERN, max_length=60)] | None = None
    """Name of the source in reports and file names: letters, digits, `.`, `_` and `-`; from its path when absent."""
    weight: NonNegativeFloat | None = None
    """Share of the run's samples that this source gives, relative to the other weights. Absent in all: by size."""


class PythonStdlibSource(SourceSection):
    """The standard library's own source files, tests left out: text that every Python has."""

    kind: Literal["python-stdlib"]
    """Marks the built-in source."""


class TextSource(SourceSection):
    """Local UTF-8 text files, a document each."""

    kind: Literal["text"]
    """Marks local text files."""
    path: str
    """A file, a folder (every .txt, .md and .py below it), or a glob; .gz and .zst are unpacked."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Line that stands between the documents of a file, such as `<|endoftext|>`; a file is one document when absent."""


class JsonlSource(SourceSection):
    """Local files of one JSON object a line, a document each."""

    kind: Literal["jsonl"]
    """Marks JSON lines."""
    path: str
    """A file, a folder (every .jsonl, .jsonl.gz and .jsonl.zst below it), or a glob."""
    text_column: str = "text"
    """Key that holds the document."""


class ParquetSource(SourceSection):
    """Local Parquet files, a document in each row."""

    kind: Literal["parquet"]
    """Marks Parquet files."""
    path: str
    """A file, a folder (every .parquet below it), or a glob."""
    text_column: str = "text"
    """Column that holds the documents."""


class HuggingFaceSource(SourceSection):
    """A dataset of the Hugging Face `datasets` library."""

    kind: Literal["huggingface"]
    """Marks a Hugging Face dataset."""
    name: str
    """A name on the Hub, or a local folder: one written by `save_to_disk`, or of data files."""
    subset: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Split to read."""
    text_column: str = "text"
    """Column that holds the documents."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    streaming: bool = False
    """Whether rows are read as they arrive instead of the whole dataset being downloaded first."""


class DeepLakeSource(SourceSection):
    """A Deep Lake dataset; needs `pip install 'dsllm[deeplake]'`."""

    kind: Literal["deeplake"]
    """Marks a Deep Lake dataset."""
    path: str
    """A local dataset's folder, or an address such as `hub://activeloop/openwebtext-train`."""
    text_column: str = "text"
    """Column (tensor) that holds the documents."""


Source = Annotated[
    PythonStdlibSource | TextSource | JsonlSource | ParquetSource | HuggingFaceSource | DeepLakeSource,
    Field(discriminator="kind"),
]


class Data(Section):
    """The text to train on."""

    sources: Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]
    """Where documents come from."""
    validation_sources: Annotated[tuple[Source, ...], Field(strict=False)] = ()
    """Where documents come from that are only evaluated, each source reported by its label."""
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0005
    """Share of the documents that is held out: no training sample touches them, nor exact copies of them. 0 only beside
    `validation_sources`."""
    drop_duplicates: bool = False
    """Whether of documents with exactly the same text only the first is kept, those of `validation_sources` first."""
    min_document_characters: NonNegativeInt = 0
    """Shorter documents are dropped."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents fill sequences: one after the other, cut wherever a sequence ends; or packed so that no document is
    cut that fits, with a little padding, which never counts in the loss."""
    mask_documents: bool = False
    """Whether attention stays within a document, and positions restart with it."""
    max_epochs: PositiveFloat = 4.0
    """A source that the run repeats more often than this is warned about (arXiv:2305.16264: up to 4 epochs, tokens are
    nearly as good as new ones)."""
    directory: str | None = None
    """Folder of the prepared tokens; `data/<spec name>` when absent."""
    shard_tokens: Annotated[int, Field(ge=1024)] = 100_000_000
    """Tokens in a shard file at most."""


class Batch(Section):
    """How many sequences, and how long. Counts are sequences unless a name says tokens."""

    sequence_length: PositiveInt
    """Tokens in a sequence."""
    global_batch_size: PositiveInt
    """Sequences in an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Sequences per GPU per forward pass, or `auto`: the largest that divides the batch and is predicted to fit."""


class Training(Section):
    """How long, and how precisely. Of `tokens` and `train_steps` the first reached ends the run."""

    tokens: PositiveInt | None = None
    """Tokens to train on."""
    train_steps: PositiveInt | None = None
    """Optimizer steps to train for."""
    precision: Precision = "bf16"
    """Type of weights and activations; the optimizer keeps an fp32 master copy."""
    gradient_accumulation_precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type in which gradients add up over micro-batches; `auto` is fp32 wherever the ZeRO stage can."""
    loss_scale: NonNegativeFloat = 0.0
    """Loss scale of fp16; 0 is dynamic."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Blocks whose activations are computed again in backward: none, every second one, or all."""
    compile: bool = False
    """Whether blocks are compiled with torch.compile."""
    kernels: Literal["auto", "liger", "torch"] = "auto"
    """Whose kernels compute norms, rotary positions and gated feed-forward layers: liger-kernel's fused ones (CUDA,
    where it has them for the family) or torch's own. `auto` is liger where that is installed, can run and blocks are
    not compiled."""
    tf32: bool = True
    """Whether matrix products in fp32 may round their inputs to TF32, where the GPU has it."""
    loss: Literal["auto", "chunked", "fused", "plain"] = "auto"
    """How cross-entropy is computed: in chunks of the sequence, by liger-kernel's fused kernel (CUDA), or plainly.
    `auto` is fused where that is installed and can run, else chunked."""


class Optimizer(Section):
    """How gradients become updates; weight decay is on matrices only."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon (momentum made orthogonal) for the matrices of blocks, and AdamW for embeddings, head and
    vectors."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveFloat = 0.02
    """Peak learning rate of Muon's matrices (muon only); it follows the same schedule."""
    muon_momentum: Decay = 0.95
    """Decay of Muon's momentum (muon only)."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    """Decay of the first and second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices; vectors (biases, norms) are never decayed."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest allowed norm of the gradients, before Muon makes anything of them; 0 switches clipping off."""
    fused: bool = True
    """Whether AdamW's update is one kernel for all tensors, rather than one for each of its operations."""


class Schedule(Section):
    """Learning rate over the run: a pure function of the step."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; `wsd` is warm-up, stable, decay."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    min_learning_rate_ratio: Fraction = 0.1
    """Learning rate at the end, as a share of the peak (not for `constant`)."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the run that `wsd` decays over, at its end."""


class Zero(Section):
    """DeepSpeed ZeRO: what is partitioned over the ranks, and what is moved off the GPU."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2
    """0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters."""
    offload_optimizer: OffloadDevice = "none"
    """Where optimizer states live: cpu from stage 1 on, nvme at stage 3."""
    offload_param: OffloadDevice = "none"
    """Where parameters live between uses: stage 3 only."""
    nvme_path: str | None = None
    """Folder on the NVMe drive, for offload to nvme."""
    overlap_comm: bool | Literal["auto"] = "auto"
    """Whether communication goes on beside computation; `auto` is on at stage 3 and off at stages 1 and 2, where
    versions of DeepSpeed have corrupted gradients."""
    reduce_bucket_elements: PositiveInt | None = None
    """Gradient elements reduced at a time; fitted to the model when absent."""
    gather_bucket_elements: PositiveInt | None = None
    """Parameter elements gathered at a time: after a step (stages 1, 2), ahead of use (stage 3); fitted when absent."""
    persistence_threshold_elements: NonNegativeInt | None = None
    """Stage 3: parameters up to this size stay whole on every rank; fitted when absent."""
    max_live_elements: PositiveInt | None = None
    """Stage 3: parameters gathered at any time at most; fitted when absent."""


class Checkpoint(Section):
    """When the run's state is written, and how much of it is kept."""

    interval: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 3
    """Checkpoints kept; older ones are deleted once a newer one is complete and read back."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of so many steps are kept for good; none when absent."""
    asynchronous: bool = True
    """Whether training goes on while a checkpoint is written; it waits for the copy to host memory only, which needs as
    much free host memory as the rank's part of a checkpoint."""
    on_failure: Literal["continue", "stop"] = "continue"
    """Whether a checkpoint that cannot be written ends the run, or is a warning until the last one."""


class Guards(Section):
    """What watches over a run, and when it ends one that has gone wrong."""

    step_0_checks: bool = True
    """Whether a fresh run first makes the checks of `dsllm check`: weights, loss and gradients, on a small model."""
    nonfinite_limit: PositiveInt = 3
    """Steps in a row with a loss or gradient that is not finite, at which the run ends."""
    spike_window: Annotated[int, Field(ge=10)] = 100
    """Steps whose losses say what is usual."""
    spike_threshold: PositiveFloat = 8.0
    """Robust z-score (distance from the median of the window, in units of its spread) above which a loss is a spike."""
    on_spike: Literal["warn", "roll_back"] = "warn"
    """Whether a spike is only reported, or the run goes back to its last checkpoint and skips the samples behind it."""
    max_roll_backs: PositiveInt = 3
    """Times that a run goes back, at most; after that a spike is only reported."""
    hang_seconds: PositiveFloat = 1800.0
    """A run in which some rank makes no progress for so long ends, with the stacks of every rank in its log."""


class HellaSwag(Section):
    """Which of four endings the model finds likeliest, asked of the items of a file."""

    path: str
    """A JSONL file of HellaSwag's rows (`ctx_a`, `ctx_b`, `activity_label`, `endings`, `label`), or a dataset with a
    validation split of them: a folder, or a name on the Hub such as `Rowan/hellaswag`."""
    items: PositiveInt | None = None
    """Items asked, the first of the file; all when absent."""
    interval: PositiveInt = 1000
    """Steps between scores; the last step is always scored."""


class Samples(Section):
    """Text that the model writes while it trains."""

    prompts: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """What it goes on from, each by itself."""
    interval: PositiveInt = 1000
    """Steps between samples; the last step always writes some."""
    max_new_tokens: PositiveInt = 64
    """Tokens to write at most."""
    temperature: NonNegativeFloat = 0.8
    """0 takes the likeliest token each time."""
    top_k: NonNegativeInt = 50
    """Choose among so many tokens; 0 for all."""


class Evaluation(Section):
    """What a run is asked at intervals: validation loss on a fixed set of samples, and what is named here."""

    interval: PositiveInt = 250
    """Steps between evaluations; the first and the last step are always evaluated."""
    batches: PositiveInt = 20
    """Validation samples, in global batches, at most."""
    hellaswag: HellaSwag | None = None
    """HellaSwag's score in training; absent, none is taken."""
    samples: Samples | None = None
    """Text written in training; absent, none is."""


class Wandb(Section):
    """Weights & Biases."""

    project: str = "dsllm"
    """Project of the run."""
    entity: str | None = None
    """Team or user; the key's own when absent."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online where a key is found, offline otherwise."""


class Logging(Section):
    """Where metrics go besides the screen and `metrics.jsonl`."""

    wandb: Wandb | None = None
    """Weights & Biases; absent, nothing is sent or written."""
    tensorboard: bool = True
    """Whether TensorBoard files are written under `logs/tensorboard`."""


class Launch(Section):
    """How ranks are started; nothing here changes what they compute."""

    environment: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Variables that go along to every host, by name or by a pattern such as `AWS_*`, never with their values. Those of
    WANDB_*, HF_*, NCCL_*, DSLLM_*, GLOO_*, TORCH_*, OMP_*, PYTHON*, MV2*, UCX* and MLFLOW* go along unasked."""


class Spec(Section):
    """One training run."""

    name: Annotated[str, Field(pattern=LABEL_PATTERN, max_length=100)]
    """Name of the run and of its folder: letters, digits, `.`, `_` and `-`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1337
    """Decides initial weights and the order of samples."""
    model: AnyModel
    """The network."""
    tokenizer: Tokenizer
    """How text becomes tokens."""
    data: Data
    """The text."""
    batch: Batch
    """The batch."""
    training: Training
    """The run's length and precision."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""
    schedule: Schedule = Schedule()
    """The learning rate over time."""
    zero: Zero = Zero()
    """The partitioning."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    guards: Guards = Guards()
    """Faults."""
    evaluation: Evaluation = Evaluation()
    """Validation."""
    logging: Logging = Logging()
    """Dashboards."""
    launch: Launch = Launch()
    """Starting."""

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Spec:
        """Refuses, with every broken rule at once, sections that are each valid but not together."""
        problems = broken_rules({name: getattr(self, name) for name in type(self).model_fields})
        if problems:
            raise SpecError(problems)
        return self

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows, before padding: the model's own field, else what the tokenizer has."""
        size = vocab_size(self.model, self.tokenizer)
        assert size is not None, "the rules refuse a spec whose vocabulary is unknown"
        return size

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step, over all ranks."""
        return self.batch.global_batch_size * self.batch.sequence_length

    @property
    def train_steps(self) -> int:
        """Optimizer steps of the whole run: whichever of `tokens` and `train_steps` is reached first."""
        return train_steps(self.training, self.tokens_per_step)
