"""Where a model is written: a folder that holds nothing yet, so that no file of another is taken for one of it."""

from __future__ import annotations

from pathlib import Path

from dsllm.errors import UserError


def refuse_filled(output: Path, what: str) -> None:
    """UserError where `output`, which is to hold `what`, is a file, or a folder that holds something."""
    if output.is_file() or (output.exists() and any(output.iterdir())):
        raise UserError(f"{output}: not empty; choose another folder for {what}, or empty it")
