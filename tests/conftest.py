"""What all tests share: an environment that reaches no network, and one queue for tests that start ranks."""

from __future__ import annotations

import os

import pytest

# Set before any test imports the libraries that read them. A test that wants another value sets it for itself.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `distributed` share one worker: two DeepSpeed starts at once would fight for the cores."""
    for item in items:
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.xdist_group("distributed"))
