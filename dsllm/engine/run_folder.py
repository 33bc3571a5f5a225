"""The folder of a run: what is in it, and what is written before the first step."""

from __future__ import annotations

import json
import logging
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dsllm import __version__
from dsllm.data.shards import manifest_hash, read_manifest
from dsllm.engine.rank_output import goes_to_log, log_file
from dsllm.spec.load import dump_spec
from dsllm.spec.sections import Spec

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "sentencepiece", "numpy")


class RunFolder:
    """Paths of one run. Scripts rely on these names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = path / "spec.yaml"
        self.ds_config = path / "ds_config.json"
        self.passport = path / "passport.json"
        self.metrics = path / "metrics.jsonl"
        self.history = path / "history.jsonl"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"
        self.memory = path / "memory.json"
        self.checks = path / "checks.json"
        self.logs = path / "logs"


def describe_run(folder: RunFolder, spec: Spec, ds_config: dict[str, Any], passport: dict[str, Any]) -> None:
    """Write the spec, DeepSpeed's JSON and the passport. Rank 0 only."""
    write_whole(folder.spec, dump_spec(spec))
    write_whole(folder.ds_config, json.dumps(ds_config, indent=2) + "\n")
    write_whole(folder.passport, json.dumps(passport, indent=2) + "\n")


def make_passport(spec: Spec, world_size: int, device: str, data: Path, init: dict[str, Any]) -> dict[str, Any]:
    """What a run was made with: enough to compare two runs, nothing of the environment, which may hold keys.

    `init` says what its weights were at first.
    """
    return {
        "dsllm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "world_size": world_size,
        "device": device,
        "seed": spec.seed,
        "init": init,
        "data_hash": manifest_hash(data),
        "tokenizer_hash": read_manifest(data).tokenizer_sha256,
    }


def log_to(folder: Path, rank: int) -> None:
    """Everything to `rank<r>.log`; what dsllm itself says on rank 0 to stderr too, unless that is the same file.

    An entry's own `on_screen` decides otherwise, on any rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(log_file(folder, rank))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    screen.addFilter(lambda entry: getattr(entry, "on_screen", rank == 0 and entry.name.startswith("dsllm")))
    handlers = [file] if goes_to_log(rank) else [file, screen]
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.captureWarnings(True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # its lines hold whole addresses, signatures included
    for library in ("DeepSpeed", "transformers"):  # they print by themselves unless told to leave it to the root
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
