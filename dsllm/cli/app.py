"""The `dsllm` command: its families of commands, and how their faults reach the user.

Nothing heavy is imported here or at the top of the command modules: what a command needs is imported inside it, so
that help answers at once and planning works where torch is not installed.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from dsllm import __version__
from dsllm.cli import (
    calibrate,
    check,
    checkpoints,
    data,
    doctor,
    estimate,
    evaluate,
    grow,
    hostfile,
    launch,
    models,
    plan,
    speak,
    spec,
    tokenizer,
)
from dsllm.cli.plain import PlainGroup
from dsllm.errors import DsllmError

DEBUG_VARIABLE = "DSLLM_DEBUG"

app = typer.Typer(
    name="dsllm",
    cls=PlainGroup,
    epilog="Example: dsllm validate quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dsllm {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks; {DEBUG_VARIABLE}=1 does the same.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Pre-train language models on DeepSpeed, from one validated spec."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"  # in the environment, so that ranks started from here know it too


trained = typer.Typer(rich_markup_mode=None)
trained.command()(models.export)
trained.command()(grow.grow)
trained.command()(evaluate.evaluate)
trained.command()(speak.generate)
trained.command()(speak.chat)

# in the order in which a user meets them
app.add_typer(spec.app)
app.add_typer(estimate.app)
app.add_typer(plan.app)
app.add_typer(calibrate.app)
app.add_typer(tokenizer.app, name="tokenizer", epilog="Example: dsllm tokenizer train quickstart")
app.add_typer(data.app, name="data", epilog="Example: dsllm data prepare quickstart")
app.add_typer(check.app)
app.add_typer(hostfile.app)
app.add_typer(doctor.app)
app.add_typer(launch.app)
app.add_typer(checkpoints.app, name="checkpoints", epilog="Example: dsllm checkpoints list runs/quickstart")
app.add_typer(trained)


def main() -> None:
    """Entry point of the console script: a fault is its message on stderr and its exit status, without a traceback."""
    try:
        app()
    except DsllmError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"dsllm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"dsllm: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
