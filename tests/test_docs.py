"""Documentation that cannot rot: generated pages are current, links lead somewhere, messages are explained."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("ds_configs/*.md")])
ERRORS = {"DsllmError", "UserError", "SpecError", "DataError", "CheckpointError", "TrainingError", "OneRankError"}


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return runpy.run_path(str(ROOT / "docs/generate.py"))["generated_files"]()


@pytest.mark.parametrize(
    "path",
    ["README.md", "docs/checkpoints.md", "docs/cli.md", "docs/memory.md", "docs/planning.md", "docs/spec.md"],
)
def test_a_generated_page_is_current(generated: dict[str, str], path: str) -> None:
    assert (ROOT / path).read_text() == generated[path], "run python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file.read_text()), target


def test_every_error_message_is_explained() -> None:
    explained = _explained()
    for where, pieces in _raised():
        assert any(words in piece for words in explained for piece in pieces), (
            f"{where}: add a row to docs/troubleshooting.md for: {'…'.join(pieces)}"
        )


def test_every_explained_message_is_one_that_dsllm_has() -> None:
    said = [piece for file in _modules() for node in ast.walk(_parse(file)) for piece in _literals(node)]
    assert [words for words in _explained() if not any(words in piece for piece in said)] == []


def _anchors(text: str) -> set[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _explained() -> list[str]:
    """The first column of the tables of messages: words that stand in a message as they are."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    tables = re.findall(r"^\| the message says \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [re.match(r"\| `(.+?)` \|", row)[1] for table in tables for row in table.splitlines()]


def _modules() -> list[Path]:
    return sorted((ROOT / "dsllm").rglob("*.py"))


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _literals(node: ast.AST) -> list[str]:
    """The constant pieces of a text, in order: everything between the braces of an f-string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant)]
    if isinstance(node, ast.BinOp):
        return [*_literals(node.left), *_literals(node.right)]
    return []


def _raised() -> Iterator[tuple[str, list[str]]]:
    """The place and constant pieces of every message that is raised, or yielded by a rule, where it is spelled."""
    for file in _modules():
        is_rules = file.name == "rules.py"
        for node in ast.walk(_parse(file)):
            message = None
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ERRORS and node.args:
                message = node.args[0]
            elif is_rules and isinstance(node, ast.Yield):
                message = node.value
            if message is not None and (pieces := _literals(message)):
                yield f"{file.relative_to(ROOT)}:{message.lineno}", pieces
