"""A checkpoint of any stage becomes a plain Hugging Face folder, and is not called exported before it was read back."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dsllm.checkpoint.layout import run_folder_of
from dsllm.checkpoint.manifest import read_manifest
from dsllm.checkpoint.model_card import model_card
from dsllm.checkpoint.resume import checkpoint_at
from dsllm.checkpoint.run_facts import read_facts
from dsllm.checkpoint.states import MASTER, open_states
from dsllm.checkpoint.verify import faults_of
from dsllm.data.tokenizer import token_count
from dsllm.errors import CheckpointError, UserError
from dsllm.model.build import DTYPES, build_model, model_config
from dsllm.model.output_folder import refuse_filled
from dsllm.model.positions import num_positions
from dsllm.model.pretrained import load_pretrained
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Precision, Spec

logger = logging.getLogger(__name__)

WEIGHTS_PREFIX = "causal_lm."
"""What engine names have before transformers' own: the attribute of TrainingModel."""
PROBE_TOKENS = 64
"""Length of the sequence whose logits are compared."""
CARD_FILE = "README.md"
MAX_SHARD_BYTES = 5_000_000_000
"""Weights beyond this are split over several safetensors files, as most models on the Hub are."""


def export_run(
    run: Path, output: Path, precision: Precision | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Write the latest checkpoint of the run folder `run`, or the checkpoint that `run` is, to `output`, with a card.

    `precision` of the weights is that of the training when None. Returns the steps that the model was trained for.
    Raises UserError for a run without checkpoints or an `output` that holds something, CheckpointError for a damaged
    checkpoint, and where what was written does not give the same logits when it is read back; then nothing stays in
    `output`.
    """
    refuse_filled(output, "the exported model")
    checkpoint, spec = find_run(run)
    if faults := faults_of(checkpoint):
        raise CheckpointError(f"{checkpoint}: {faults[0]}; export another checkpoint of the run")
    model = load_trained(checkpoint, spec, DTYPES[precision or spec.training.precision])
    tokenizer_folder = run_folder_of(checkpoint) / "tokenizer"
    _set_special_tokens(model, AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False))
    try:
        model.save_pretrained(output, max_shard_size=max_shard_bytes)
        shutil.copytree(tokenizer_folder, output, dirs_exist_ok=True)  # as it was trained with, to the byte
        _compare_logits(model, output)
        card = model_card(output.resolve().name, read_facts(checkpoint, spec), model)
        (output / CARD_FILE).write_text(card, encoding="utf-8")
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return read_manifest(checkpoint).step


def load_any(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of an exported folder, a run, or a checkpoint, on the CPU in fp32.

    Raises UserError, CheckpointError where it is none, or broken.
    """
    checkpoint = checkpoint_of(source)
    if checkpoint is None:
        return load_pretrained(source)
    _, spec = find_run(checkpoint)
    model = load_trained(checkpoint, spec, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run_folder_of(checkpoint) / "tokenizer", trust_remote_code=False)
    _set_special_tokens(model, tokenizer)
    return model, tokenizer


def checkpoint_of(source: Path) -> Path | None:
    """Of a run or checkpoint; None of a Hugging Face folder. Raises UserError for what is neither."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give a run, one of its checkpoints, or an exported folder")
    return None if (source / "config.json").is_file() else checkpoint_at(source)


def find_run(run: Path) -> tuple[Path, Spec]:
    """The checkpoint folder and the spec of a run. Raises UserError where there is none, or the run is not with it."""
    checkpoint = checkpoint_at(run)
    folder = run_folder_of(checkpoint)
    for name in ("spec.yaml", "tokenizer"):
        if not (folder / name).exists():
            raise UserError(
                f"{checkpoint}: there is no {name} of its run in {folder}; move whole runs, and keep checkpoints apart "
                "from theirs by dsllm checkpoints convert --output"
            )
    return checkpoint, load_spec(str(folder / "spec.yaml"))


def load_trained(checkpoint: Path, spec: Spec, dtype: torch.dtype) -> PreTrainedModel:
    """The trained model on the CPU, from a checkpoint of any stage and number of ranks."""
    weights = {name.removeprefix(WEIGHTS_PREFIX): tensor for name, tensor in _weights(checkpoint).items()}
    model = build_model(model_config(spec), dtype)
    _, unexpected = model.load_state_dict(weights, strict=False)
    missing = {name for name, _ in model.named_parameters()} - weights.keys()
    empty = [name for name, tensor in weights.items() if tensor.numel() == 0]
    if missing or unexpected or empty:
        raise CheckpointError(
            f"{checkpoint}: its weights are not those of its spec: missing {sorted(missing)}, "
            f"unexpected {sorted(unexpected)}, empty {empty}"
        )
    return model.eval()


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Whole fp32 weights by name, from any stage and number of ranks."""
    states = open_states(checkpoint)
    weights = {name: torch.empty(shape, dtype=torch.float32) for name, shape in states.shapes.items()}
    for name, weight in weights.items():
        states.copy(MASTER, name, 0, weight.view(-1))
    return weights


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `generate()` stop where documents ended in training, start as they started, and write tokens only."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.bos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.eos_token_id
        config.use_cache = True
    # Rows that only pad the vocabulary are no tokens.
    padding = list(range(token_count(tokenizer), model.config.get_text_config().vocab_size))
    model.generation_config.suppress_tokens = padding or None


@torch.no_grad()
def _compare_logits(model: PreTrainedModel, folder: Path) -> None:
    """Read `folder` as a stranger would, and compare with the model it was written from."""
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    length = min(PROBE_TOKENS, num_positions(model.config) or PROBE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    logits = model(ids).logits
    if not logits.isfinite().all():
        raise CheckpointError(f"{folder}: the trained model's logits are not finite; export an earlier checkpoint")
    difference = (logits - again(ids).logits).abs().max().item()
    if difference != 0.0:
        raise CheckpointError(f"{folder}: logits differ by {difference:.3g} after reading it back; nothing was kept")
    logger.info("%s: read back, %d logits are the same", folder, ids.numel() * model.config.vocab_size)
