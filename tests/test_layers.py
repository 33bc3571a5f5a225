"""The house keeps its floors: imports point downward, and the light half needs nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dsllm"

LAYERS = [
    ("errors", "units"),
    ("spec",),
    ("plan",),
    ("ds_config",),
    ("launch",),
    ("data",),
    ("model",),
    ("evaluation",),
    ("engine",),
    ("checkpoint",),
    ("train",),
]
"""Lowest first; a part imports from its own layer and from lower ones. `cli` stands beside them all."""

LIGHT = {"errors", "units", "spec", "plan", "ds_config", "launch", "cli"}
HEAVY = {
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "numpy",
    "sentencepiece",
    "tokenizers",
    "safetensors",
    "wandb",
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def height(part: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def imports(path: Path, at_module_level: bool) -> set[str]:
    """Full names of the modules that a file imports: while it is itself imported, or anywhere in it."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not (at_module_level and (is_function or _is_for_type_checking(node))):
            pending += ast.iter_child_nodes(node)
    return names


def _is_for_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def parts_imported(path: Path, at_module_level: bool) -> set[str]:
    names = imports(path, at_module_level)
    return {name.split(".")[1] for name in names if name.startswith("dsllm.")} - {"__version__"}


def identify(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_imports_point_downward(path: Path) -> None:
    part = part_of(path)
    if part == "cli":
        assert parts_imported(path, at_module_level=True) <= {"cli", "errors", "units"}
        return
    above = {
        other for other in parts_imported(path, at_module_level=True) if other == "cli" or height(other) > height(part)
    }
    assert above == set()


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path) in LIGHT], ids=identify)
def test_the_light_half_imports_nothing_heavy(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path, at_module_level=part_of(path) == "cli")}
    assert roots & HEAVY == set()


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path) not in {"cli", "train"}], ids=identify)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)


LIGHT_COMMANDS = [
    ["--help"],
    ["--version"],
    ["validate", "1b"],
    ["validate", "1b", "--set", "zero.stage=3", "--json"],
    ["schema"],
    ["presets"],
    ["config", "1b", "--world-size", "16"],
    ["estimate-memory", "--params", "1e9", "--zero", "3"],
    ["estimate-memory", "--spec", "1b", "--gpus", "8", "--json"],
    ["plan", "1b", "--gpu", "a100-40gb", "--gpus", "8"],
    ["plan", "--params", "1e9", "--deadline-hours", "24"],
    ["hostfile", "--help"],
    ["doctor", "--help"],
    ["launch", "quickstart", "--dry-run"],
    ["launch", "quickstart", "--hostfile", "hostfiles/two-node", "--set", "batch.micro_batch_size=1", "--dry-run"],
    ["data", "--help"],
    ["data", "prepare", "--help"],
    ["check", "--help"],
    ["checkpoints", "--help"],
    ["checkpoints", "convert", "--help"],
    ["export", "--help"],
    ["grow", "--help"],
    ["generate", "--help"],
    ["chat", "--help"],
    ["evaluate", "--help"],
]

WITHOUT_HEAVY_MODULES = f"""
import sys
for name in {sorted(HEAVY)}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
from dsllm.cli.app import main
main()
"""


@pytest.mark.parametrize("arguments", LIGHT_COMMANDS, ids=" ".join)
def test_a_light_command_runs_where_torch_is_not_installed(arguments: list[str]) -> None:
    command = [sys.executable, "-c", WITHOUT_HEAVY_MODULES, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout
