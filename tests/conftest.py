"""What all tests share: an environment that reaches no network."""

from __future__ import annotations

import os

# Set before any test imports the libraries that read them. A test that wants another value sets it for itself.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
