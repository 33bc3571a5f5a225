"""How far a run has come, as its folder tells."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path


def steps_done(run_dir: Path) -> int:
    """Steps that a run has recorded in `metrics.jsonl`; 0 before the first."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines()[-2:]
    except OSError:
        return 0
    steps = [0]
    for line in lines:  # of a killed run the last one may be torn
        with contextlib.suppress(ValueError, KeyError, TypeError):
            steps.append(json.loads(line)["step"])
    return steps[-1]
