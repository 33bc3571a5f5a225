"""The devices that a command knows: the catalogue's, and the user's own from --hardware or DSLLM_HARDWARE."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from dsllm.plan.hardware import Gpu

HARDWARE_VARIABLE = "DSLLM_HARDWARE"

Hardware = Annotated[
    Optional[str],  # noqa: UP045 - evaluated at run time, also by Python 3.10
    typer.Option(
        "--hardware",
        metavar="FILE",
        help=f"Your own devices and prices; {HARDWARE_VARIABLE} does the same.",
        show_default=False,
    ),
]


def known_devices(hardware: str | None) -> tuple[Gpu, ...]:
    """The catalogue, with the file of --hardware laid over it, else the one that the variable names.

    Raises UserError for a file that is not of the catalogue's form.
    """
    from dsllm.plan.hardware import catalogue, with_user_file

    path = (os.environ.get(HARDWARE_VARIABLE) or None) if hardware is None else hardware
    return catalogue() if path is None else with_user_file(Path(path))
