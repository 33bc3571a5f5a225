"""Commands on trained models: export, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or a checkpoint: global_step<N>, converted or not.")],
    output: Annotated[Path, typer.Argument(help="Folder to write: safetensors, config and tokenizer.")],
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


def generate(
    source: Annotated[Path, typer.Argument(help="Folder of a run, or an exported folder.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Continuations to write.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among so many tokens; 0 for all.")] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Choose among this share of the probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 1337,
) -> None:
    """Let a trained model continue a prompt.

    Example: dsllm generate runs/quickstart --prompt "def main(" --samples 3
    """
    quiet_libraries()
    from dsllm.checkpoint.export import load_any
    from dsllm.model.generate import generate as continuations

    model, tokenizer = load_any(source)
    texts = continuations(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        num_samples=samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    for number, text in enumerate(texts, 1):
        if samples > 1:
            typer.secho(f"--- sample {number}", dim=True)
        typer.echo(text)


def quiet_libraries() -> None:
    """These commands need no accelerator and no word from DeepSpeed or transformers beyond errors."""
    import logging
    import os

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
