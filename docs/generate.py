"""Writes what is generated: docs/spec.md, docs/cli.md, in README.md the presets and the outputs of light commands, and
in README.md and docs/planning.md the known runs, and in docs/memory.md and docs/checkpoints.md what was measured.

python docs/generate.py

A command is light where it needs no torch and leaves nothing behind: those show what they print today, as on a machine
without GPUs. A test fails while any of this is stale.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer

from dsllm.cli.app import app
from dsllm.launch.environment import selected
from dsllm.plan.known_runs import KNOWN_RUNS
from dsllm.plan.model_shape import model_shape
from dsllm.spec.load import load_spec, preset_names
from dsllm.spec.schema import describe, spec_schema, tag_of, tag_values
from dsllm.units import format_bytes, format_count

ROOT = Path(__file__).resolve().parents[1]
HELP_COLUMNS = 100
LIGHT_COMMANDS = ("validate", "schema", "presets", "config", "estimate-memory", "plan")
NOTE = "<!-- written by docs/generate.py: do not edit -->"


# --- README.md --------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A fenced shell command, and the output that is shown below it."""

    command: str
    output: str | None

    @property
    def is_light(self) -> bool:
        words = self.command.split()
        return words[0] == "dsllm" and (words[1] in LIGHT_COMMANDS or (words[1] == "launch" and "--dry-run" in words))


_FLAGS = re.MULTILINE | re.DOTALL
_EXAMPLE = re.compile(r"^```bash\n(?P<command>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", _FLAGS)
_FILE = re.compile(r"^```yaml\n# (?P<name>\S+\.yaml)\n(?P<text>.*?)^```\n", _FLAGS)
_ACCURACY = re.compile(r"(?<=<!-- accuracy -->\n).*?(?=<!-- end of accuracy -->)", re.DOTALL)
_PHASES = re.compile(r"(?<=<!-- phases -->\n).*?(?=<!-- end of phases -->)", re.DOTALL)
_KNOWN_RUNS = re.compile(r"(?<=<!-- known runs -->\n).*?(?=<!-- end of known runs -->)", re.DOTALL)
_STALL = re.compile(r"(?<=<!-- stall -->\n).*?(?=<!-- end of stall -->)", re.DOTALL)
_PRESETS = re.compile(r"(?<=<!-- presets -->\n).*?(?=<!-- end of presets -->)", re.DOTALL)


def examples(readme: str) -> list[Example]:
    """Every shell command of the README, in order."""
    return [Example(match["command"].strip(), match["output"]) for match in _EXAMPLE.finditer(readme)]


def make_workspace(folder: Path, readme: str) -> None:
    """What the README's commands find in the current folder: the checkout's, and the files that the README spells."""
    for name in ("dsllm", "hostfiles"):
        (folder / name).symlink_to(ROOT / name)
    for match in _FILE.finditer(readme):
        (folder / match["name"]).write_text(match["text"])


def run_light(command: str, workspace: Path) -> str:
    """What a light command prints, errors included, without this machine's paths."""
    beside_python = Path(sys.executable).parent
    environment = {
        # without what a launch would tell its hosts, which differs
        **{name: value for name, value in os.environ.items() if name not in selected(os.environ)},
        "PATH": f"{beside_python}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=workspace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    text = result.stdout.replace(f"{beside_python}/", "").replace(f"{ROOT}/", "")
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines() if line.strip()) + "\n"


def presets_table() -> str:
    """The presets as Markdown, smallest first."""
    rows = ["| preset | family | parameters | sequence length | tokens | ZeRO |", "|---|---|---:|---:|---:|---:|"]
    for spec, name in sorted(((load_spec(name), name) for name in preset_names()), key=lambda pair: _size(pair[0])):
        tokens = spec.train_steps * spec.tokens_per_step
        rows.append(
            f"| `{name}` | {spec.model.family} | {_sizes(spec)} | {spec.batch.sequence_length} | "
            f"{format_count(tokens)} | {spec.zero.stage} |"
        )
    return "\n".join(rows) + "\n"


def known_runs_table() -> str:
    """Published runs as Markdown: what dsllm predicts beside what was reported."""
    rows = ["| run | on | reported | predicted | |", "|---|---|---:|---:|---:|"]
    for known in KNOWN_RUNS:
        low, high = (_figure(value) for value in known.reported)
        reported = low if low == high else f"{low} to {high}"
        rows.append(
            f"| [{known.name}]({known.source}) | {known.num_gpus} x {known.gpu} | {reported} {known.quantity} | "
            f"{_figure(known.predict())} | {known.error():+.0%} |"
        )
    return "\n".join(rows) + "\n"


def _figure(value: float) -> str:
    """Three digits or, of thousands, whole ones."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def planning() -> str:
    """docs/planning.md with the known runs as they are predicted now."""
    return _KNOWN_RUNS.sub(known_runs_table(), (ROOT / "docs/planning.md").read_text())


def accuracy_table() -> str:
    """The measured errors of the memory estimate by stage, from benchmarks/results."""
    results = json.loads((ROOT / "benchmarks/results/estimate-accuracy-cpu.json").read_text())
    rows = ["| ZeRO stage | runs | median error | most over | most under |", "|---|---:|---:|---:|---:|"]
    for stage in (0, 1, 2, 3, "all"):
        errors = [row["error"] for row in results["rows"] if stage in (row["stage"], "all")]
        rows.append(
            f"| {stage} | {len(errors)} | {statistics.median(map(abs, errors)):.2%} | {max(0, *errors):.1%} | "
            f"{-min(0, *errors):.1%} |"
        )
    return "\n".join(rows) + "\n"


def phases_table() -> str:
    """The measured errors of each phase, from the same results."""
    results = json.loads((ROOT / "benchmarks/results/estimate-accuracy-cpu.json").read_text())
    rows = ["| phase | median error | most over | most under |", "|---|---:|---:|---:|"]
    for phase in ("forward", "backward", "step"):
        errors = [row["predicted"]["phases"][phase] / row["measured"]["phases"][phase] - 1 for row in results["rows"]]
        median = statistics.median(map(abs, errors))
        rows.append(f"| {phase} | {median:.2%} | {max(0, *errors):.1%} | {-min(0, *errors):.1%} |")
    return "\n".join(rows) + "\n"


def memory() -> str:
    """docs/memory.md with the errors as they were last measured."""
    text = _ACCURACY.sub(accuracy_table(), (ROOT / "docs/memory.md").read_text())
    return _PHASES.sub(phases_table(), text)


def checkpoints() -> str:
    """docs/checkpoints.md with how long training waited for a checkpoint."""
    return _STALL.sub(stall_table(), (ROOT / "docs/checkpoints.md").read_text())


def stall_table() -> str:
    """A row a state, with the figures of the committed measurement."""
    saves = json.loads((ROOT / "benchmarks/results/checkpoint-stall-cpu.json").read_text())["saves"]
    lines = [
        "| state | on disk | DeepSpeed's save | training waits | | a step, and one while writing |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for save in saves:
        lines.append(
            f"| stage {save['stage']}, {save['precision']} | {format_bytes(save['bytes'])} "
            f"| {save['deepspeed_seconds']:.2f} s | {save['waited_seconds']:.2f} s "
            f"| {save['waited_seconds'] / save['deepspeed_seconds']:.0%} "
            f"| {save['step_seconds']:.2f} s, {save['step_while_writing_seconds']:.2f} s |"
        )
    return "\n".join(lines) + "\n"


def readme() -> str:
    """The README with its presets, the known runs and the outputs of its light commands as they are now."""
    text = _PRESETS.sub(presets_table(), (ROOT / "README.md").read_text())
    text = _KNOWN_RUNS.sub(known_runs_table(), text)

    def with_output(match: re.Match[str]) -> str:
        example = Example(match["command"].strip(), match["output"])
        if not example.is_light or example.output is None:
            return match[0]
        return match[0].replace(example.output, run_light(example.command, Path(folder)))

    with tempfile.TemporaryDirectory() as folder:
        make_workspace(Path(folder), text)
        return _EXAMPLE.sub(with_output, text)


def _sizes(spec: Any) -> str:
    """All parameters, and those that a token meets where that is not all."""
    shape = model_shape(spec)
    active = f", {shape.active_parameters / 1e6:,.1f}M active" if shape.num_experts else ""
    return f"{shape.parameters / 1e6:,.1f}M{active}"


def _size(spec: Any) -> int:
    return model_shape(spec).parameters


# --- docs/cli.md ------------------------------------------------------------------------------------------------------


def cli_reference() -> str:
    """Every command's help under a heading of its own."""
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="dsllm", **command.context_settings)
    pages = "\n".join(_help_pages(command, context))
    return (
        f"{NOTE}\n# Command line\n\nExit status: 0 done, 2 your mistake (the message says what to change), 1 a fault "
        f"while running. Messages are explained in [troubleshooting](troubleshooting.md).\n\n{pages}"
    )


def _help_pages(command: Any, context: Any) -> Iterator[str]:
    context.terminal_width = HELP_COLUMNS
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    for name, child in getattr(command, "commands", {}).items():
        yield from _help_pages(child, child.context_class(child, info_name=name, parent=context))


# --- docs/spec.md -----------------------------------------------------------------------------------------------------


def spec_reference() -> str:
    """Every section of the spec: what a field takes, its default, its docstring."""
    parts = [_section_page("", spec_schema())]
    for name, field in spec_schema()["properties"].items():
        parts += [_section_page(path, section) for path, section in _sections(name, field)]
    return (
        f"{NOTE}\n# The spec\n\nYAML or JSON. Unknown keys are errors, nothing is rewritten, and the number of GPUs is "
        "never a field. `dsllm schema` prints the same as JSON Schema, with which editors complete; "
        "`--set section.key=value` overrides any field on any command that takes a spec.\n\n" + "\n".join(parts)
    )


def _sections(path: str, node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sections that may stand at a path, and those inside them; a list's items are at `path[]`."""
    for part in node.get("oneOf") or node.get("anyOf") or [node]:
        if "$ref" in part:
            section = spec_schema()["$defs"][part["$ref"].rsplit("/", 1)[-1]]
            yield path, section
            for name, field in section["properties"].items():
                yield from _sections(f"{path}.{name}", field)
        elif "items" in part:
            yield from _sections(f"{path}[]", part["items"])


def _section_page(path: str, section: dict[str, Any]) -> str:
    tag = tag_of([section])
    values = ", ".join(f"`{value}`" for value in tag_values([section], tag)) if tag else ""
    title = f"`{path}`" + (f", {tag} {values}" if tag else "") if path else "Top level"
    rows = [_row(name, field, section.get("required", ())) for name, field in section["properties"].items()]
    table = "\n".join(["| field | takes | default | |", "|---|---|---|---|", *rows])
    return f"## {title}\n\n{section['description']}\n\n{table}\n"


def _row(name: str, field: dict[str, Any], required: Any) -> str:
    is_section = any(_sections(name, field))
    takes = "a list of sections" if "items" in field else "a section" if is_section else describe(field)
    default = "required" if name in required else "the defaults below" if is_section else _default(field["default"])
    if is_section and field.get("default", "") is None:
        default = "absent"
    cells = (f"`{name}`", takes, default, " ".join(field["description"].split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: Any) -> str:
    return "absent" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def generated_files() -> dict[str, str]:
    """The text of every generated file, by its path in the checkout."""
    return {
        "README.md": readme(),
        "docs/checkpoints.md": checkpoints(),
        "docs/cli.md": cli_reference(),
        "docs/memory.md": memory(),
        "docs/planning.md": planning(),
        "docs/spec.md": spec_reference(),
    }


if __name__ == "__main__":
    for path, text in generated_files().items():
        (ROOT / path).write_text(text)
