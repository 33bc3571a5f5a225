"""What a launch is to run, wherever and however often it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsllm.launch.launchers import Launcher
from dsllm.plan.model_shape import ModelShape
from dsllm.spec.sections import Spec


@dataclass(frozen=True)
class RunPlan:
    """A run and how it is started."""

    spec_name: str
    """As the user gave it: a path or a preset."""
    spec: Spec
    run_dir: Path
    given_run_dir: str | None = None
    """As the user gave it; None for the spec's own."""
    overrides: tuple[str, ...] = ()
    launcher: Launcher = "local"
    port: int | None = None
    """For the ranks to meet at, another one where it is in use; None for one of the launch's own."""
    asks_doctor: bool = True
    shape: ModelShape | None = None
    """Of the spec's network, where no formula has it."""
    only_checks: bool = False
    """Whether ranks make the checks before the first step and end, which leaves no history."""

    @property
    def logs(self) -> Path:
        return self.run_dir / "logs"

    @property
    def history(self) -> Path:
        return self.run_dir / "history.jsonl"

    @property
    def asks_nobody(self) -> bool:
        """Whether Slurm alone knows the hosts: it starts the ranks, and sees to the job's own end."""
        return self.launcher == "slurm" and not self.asks_doctor

    @property
    def spec_file(self) -> Path | None:
        """Where the spec is a file, which every host has to have, rather than a preset."""
        path = Path(self.spec_name)
        return path if path.is_file() else None
