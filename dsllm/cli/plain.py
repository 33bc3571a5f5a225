"""Commands that read their options for themselves: at once, and with one line for each mistake."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from dsllm.errors import UserError


class _WithoutHelp:
    """A command whose `--help` is false where it is not given, rather than nothing, which typer hands to pydantic."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.default = False
        return option


class PlainGroup(_WithoutHelp, TyperGroup):
    """The commands together, so that the way to a plain one is free of pydantic too."""


class PlainCommand(_WithoutHelp, TyperCommand):
    """A command whose options are flags, text and lists of text, handed over as they were typed.

    typer 0.29 gives even text to pydantic, whose import takes longer than all of a prediction's arithmetic; and what
    it says of a number out of range is two lines of usage.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        for parameter in self.params:
            if not getattr(parameter, "is_flag", False):
                parameter.process_value = _as_typed  # type: ignore[method-assign]


def _as_typed(ctx: Any, value: Any) -> Any:
    return value


def whole_number(option: str, text: str, what: str) -> int:
    """`8` of `--gpus 8`, at least 1. Raises UserError, naming the option and what it counts."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{option}: given '{text}'; must be a whole number from 1; give the number of {what}")
    return number


def one_of(option: str, text: str, choices: tuple[str, ...]) -> str:
    """The text, where it is one of the choices. Raises UserError, naming all of them."""
    if text not in choices:
        raise UserError(f"{option}: given '{text}'; must be one of {', '.join(choices)}")
    return text


def parameter_count(text: str) -> int:
    """`1e9`, `350M` or `1.3B` of `--params`, as a number. Raises UserError."""
    scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}.get(text[-1:].lower(), 1.0)
    try:
        count = float(text if scale == 1.0 else text[:-1]) * scale
        if not 1e4 <= count <= 1e13:
            raise ValueError
    except ValueError:
        raise UserError(f"--params: given '{text}'; must be a number from 1e4 to 1e13, as 1e9, 350M or 1.3B") from None
    return round(count)
