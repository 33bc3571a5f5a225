"""Packaging: a light core that plans and validates, and the extras that train. Tool settings are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

LIGHT = [
    "pydantic>=2.7",  # use_attribute_docstrings
    "pyyaml>=6.0",
    "rich>=13.8",
    "typer>=0.15",
]
TRAIN = [
    "datasets>=3.0",
    "deepspeed>=0.19.8",
    "ninja>=1.11",
    "numpy>=1.26",
    "safetensors>=0.4.3",
    "protobuf>=4",  # reads sentencepiece's model files
    "sentencepiece>=0.2.2",  # ids as arrays
    "tensorboard>=2.16",
    "tokenizers>=0.21",
    "torch>=2.6",
    "transformers>=5.23",
    "wandb>=0.18",
]
DEEPLAKE = [
    "deeplake>=4.3",  # reads the datasets of Deep Lake 3 too
]
HARNESS = [
    "accelerate>=1.1",  # its models of transformers import it
    "lm-eval>=0.4.12",  # loads tasks by TaskManager.load
]
DEV = [
    *HARNESS,
    "deeplake>=4.3; python_version < '3.14'",  # as [deeplake], where it has a release
    "hypothesis>=6.100",
    "mypy>=1.11",
    "psutil>=5.9",  # the test harness ends what it started
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "types-PyYAML>=6.0",
]


def version() -> str:
    """The version that the package states, read without importing the package."""
    match = re.search(r'^__version__ = "(.+)"$', (ROOT / "dsllm" / "__init__.py").read_text(), re.MULTILINE)
    assert match, "dsllm/__init__.py states no __version__"
    return match.group(1)


def long_description() -> str:
    """The README where there is one: a source archive may come without it."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="dsllm",
    version=version(),
    description="Pre-train language models on DeepSpeed, from one validated spec",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["dsllm", "dsllm.*"]),
    package_data={"dsllm.engine": ["*.cpp"], "dsllm.plan": ["hardware.yaml"], "dsllm.spec": ["presets/*.yaml"]},
    install_requires=LIGHT,
    extras_require={"train": TRAIN, "deeplake": DEEPLAKE, "harness": HARNESS, "dev": DEV},
    entry_points={"console_scripts": ["dsllm = dsllm.cli.app:main"]},
    classifiers=[
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
