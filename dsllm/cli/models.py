"""Commands on trained models: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or a checkpoint: global_step<N>, converted or not.")],
    output: Annotated[Path, typer.Argument(help="Folder to write: safetensors, config, tokenizer and a model card.")],
    precision: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Type to write the weights in; the training's when absent."),
    ] = None,
    max_shard_gb: Annotated[
        float, typer.Option(min=0.001, help="Weights above so many GB (1e9 bytes) go into several files.")
    ] = 5.0,
) -> None:
    """Write a run's latest checkpoint as a plain Hugging Face folder, read it back and compare.

    Example: dsllm export runs/quickstart out/quickstart
    """
    quiet_libraries()
    from dsllm.checkpoint.export import export_run

    step = export_run(run, output, precision, round(max_shard_gb * 1e9))
    typer.echo(f"{output}: the model after {step} steps; read back, and its logits are the same")


def quiet_libraries() -> None:
    """These commands need no accelerator and no word from DeepSpeed or transformers beyond errors."""
    import logging
    import os

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
