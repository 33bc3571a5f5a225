"""What `pip install` and `make` promise."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dsllm

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources, so that building leaves nothing in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dsllm", source / "dsllm", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", ".", "-w", "dist"]
    subprocess.run(command, cwd=source, check=True)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> importlib.metadata.PathDistribution:
    folder = next(entry for entry in zipfile.Path(wheel).iterdir() if entry.name.endswith(".dist-info"))
    return importlib.metadata.PathDistribution(folder)


def requirements(metadata: importlib.metadata.PathDistribution, extra: str) -> dict[str, Requirement]:
    """What installing with `extra` asks for, by the name that pip makes of it; the core alone for an empty one."""
    every = [Requirement(text) for text in metadata.requires or []]
    return {canonicalize_name(r.name): r for r in every if r.marker is None or r.marker.evaluate({"extra": extra})}


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonicalize_name(r.name): r for r in map(Requirement, (line for line in lines if not line.startswith("#")))
    }


def test_the_version_is_the_one_that_the_package_states(metadata: importlib.metadata.PathDistribution) -> None:
    assert metadata.version == dsllm.__version__


def test_the_core_installs_nothing_heavy(metadata: importlib.metadata.PathDistribution) -> None:
    assert set(requirements(metadata, "")) == {"pydantic", "pyyaml", "rich", "typer"}


def test_every_requirement_is_pinned_within_its_bounds(metadata: importlib.metadata.PathDistribution) -> None:
    pinned = pins()
    for requirement in (requirements(metadata, "train") | requirements(metadata, "dev")).values():
        version = str(pinned[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_the_pin_of_torch_serves_a_cpu_and_a_gpu_alike() -> None:
    assert "+" not in str(pins()["torch"].specifier)


def test_the_wheel_brings_the_presets_the_licence_and_the_command(
    wheel: Path, metadata: importlib.metadata.PathDistribution
) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    presets = {f"dsllm/spec/presets/{path.name}" for path in (ROOT / "dsllm/spec/presets").glob("*.yaml")}
    assert presets
    assert presets <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert [(entry.name, entry.value) for entry in metadata.entry_points] == [("dsllm", "dsllm.cli.app:main")]


@pytest.mark.parametrize("target", ["setup", "demo", "test", "test-all", "lint", "bench"])
def test_each_target_of_make_sets_the_environment_up_first(target: str) -> None:
    command = ["make", "--dry-run", "--always-make", target]
    commands = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "pip install" in commands


def test_make_names_the_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.9.1'\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "--always-make", "setup", f"PYTHON={old}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2
    assert f"dsllm needs Python 3.10 or newer; {old} is Python 3.9.1" in made.stderr
