"""The command that measures a device: calibrate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsllm.cli.options import AsJson

if TYPE_CHECKING:
    from dsllm.plan.calibration import DeviceConstants

app = typer.Typer(rich_markup_mode=None)

OF_ANOTHER_RUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make the measuring process a rank of a run around it."""


@app.command(epilog="Example: dsllm calibrate    or: dsllm calibrate --from runs/1b")
def calibrate(
    run: Annotated[
        Optional[str],  # noqa: UP045 - evaluated at run time, also by Python 3.10
        typer.Option("--from", metavar="RUN", help="Take what this run measured, instead of a small run of its own."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what this device holds beside tensors; estimate-memory and plan count with it from then on.

    One rank is measured: what NCCL holds to talk to other GPUs is only in a run of several, which --from reads.
    """
    from dsllm.launch.devices import calibration_file
    from dsllm.plan.calibration import constants_of_run, write_constants

    constants = _measured() if run is None else constants_of_run(Path(run) / "memory.json")
    path = calibration_file()
    write_constants(path, constants)
    typer.echo(json.dumps({**asdict(constants), "file": str(path)}, indent=2) if as_json else _sentence(constants))
    if not as_json:
        typer.echo(f"kept in {path}; estimate-memory and plan count with it from now on")


def known_constants() -> dict[str, DeviceConstants]:
    """What was calibrated on this machine, by the devices' own names."""
    from dsllm.launch.devices import calibration_file

    path = calibration_file()
    if not path.exists():
        return {}
    from dsllm.plan.calibration import read_constants

    return read_constants(path)


def _sentence(constants: DeviceConstants) -> str:
    from dsllm.units import format_bytes

    gaps = ""
    if constants.reserved_ratio is not None:
        gaps = f", and the allocator takes {constants.reserved_ratio - 1:.1%} more than tensors fill"
    return f"{constants.device}: {format_bytes(constants.runtime_bytes)} beside tensors{gaps}"


def _measured() -> DeviceConstants:
    """By a process of its own, whose chatter is shown only where it fails."""
    from importlib.util import find_spec

    from dsllm.errors import DsllmError, UserError
    from dsllm.launch.topology import count_gpus
    from dsllm.plan.calibration import DeviceConstants

    if find_spec("deepspeed") is None:
        raise UserError("calibrate: given a machine without deepspeed; measuring needs it; pip install 'dsllm[train]'")
    # PCI order is that of nvidia-smi, which tells what else is on the first GPU
    environment = {name: value for name, value in os.environ.items() if name not in OF_ANOTHER_RUN}
    environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if count_gpus() else {"DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "constants.json"
        command = [sys.executable, "-m", "dsllm.engine.calibrate", str(output)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            said = output.read_text() if output.exists() else (ended.stderr.strip().splitlines() or ["no word"])[-1]
            raise DsllmError(f"calibrate: the small run failed: {said}; does `dsllm launch quickstart` run here?")
        return DeviceConstants(**json.loads(output.read_text()))
