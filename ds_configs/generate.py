"""Writes this folder: the DeepSpeed JSON of preset `1b` at every ZeRO stage, and the spec that each comes from.

python ds_configs/generate.py
"""

from __future__ import annotations

import json
from pathlib import Path

from dsllm.ds_config import build_ds_config
from dsllm.spec.load import dump_spec, load_spec

PRESET = "1b"
WORLD_SIZE = 8

_NVME = "zero.nvme_path=/mnt/nvme"
EXAMPLES = {
    "zero-0": ["zero.stage=0"],
    "zero-1": ["zero.stage=1"],
    "zero-2": ["zero.stage=2"],
    "zero-2-cpu-offload": ["zero.stage=2", "zero.offload_optimizer=cpu"],
    "zero-3": ["zero.stage=3"],
    "zero-3-cpu-offload": ["zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_param=cpu"],
    "zero-3-nvme": ["zero.stage=3", "zero.offload_optimizer=nvme", "zero.offload_param=nvme", _NVME],
}
"""By file name: what is changed in the preset."""


def example_files() -> dict[str, str]:
    """The text of every generated file, by its name."""
    files = {}
    for name, overrides in EXAMPLES.items():
        spec = load_spec(PRESET, overrides)
        changes = " ".join(f"--set {override}" for override in overrides)
        files[f"{name}.yaml"] = f"# {PRESET} {changes}, with every default written out\n{dump_spec(spec)}"
        files[f"{name}.json"] = json.dumps(build_ds_config(spec, WORLD_SIZE), indent=2) + "\n"
    return files


if __name__ == "__main__":
    for file_name, text in example_files().items():
        Path(__file__).with_name(file_name).write_text(text)
