"""What all tests share: an environment that reaches no network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Set before any test imports the libraries that read them. A test that wants another value sets it for itself.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture
def plain_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPUs, no job, nothing that would be told to other hosts; all launchers seem to be installed."""
    from dsllm.launch import launchers

    monkeypatch.setenv("DSLLM_DEBUG", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in os.environ:
        if name.startswith(("SLURM", "HF_", "WANDB_", "NCCL_", "TORCH_", "OMP_", "PYTHON", "GLOO_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(launchers.shutil, "which", lambda name: f"/bin/{name}")
