"""Which layers of an existing model become those of a new one: `0-7,4-11` is the first 8 and the last 8 of 12."""

from __future__ import annotations

import re
from itertools import chain

from dsllm.errors import UserError

_RANGE = re.compile(r"(?P<first>\d{1,4})(?:-(?P<last>\d{1,4}))?")


def parse_layers(text: str, name: str) -> tuple[range, ...]:
    """The ranges of a list such as `0-7,4-11`, in its order; a layer by itself is a range of one.

    Raises UserError, which begins with the field or option `name`, for anything else, and for a range that goes down.
    """
    matches = [_RANGE.fullmatch(part.strip()) for part in text.split(",")]
    ranges = []
    for match in matches:
        if match is None:
            raise UserError(f"{name}: given '{text}'; must be ranges of layers, counted from 0, such as 0-7,4-11")
        first, last = int(match["first"]), int(match["last"] or match["first"])
        if last < first:
            raise UserError(
                f"{name}: given '{text}', where {match[0]} goes down; layers of a range go up; write {last}-{first}, "
                "or each layer by itself to turn their order round"
            )
        ranges.append(range(first, last + 1))
    return tuple(ranges)


def layer_numbers(ranges: tuple[range, ...]) -> tuple[int, ...]:
    """The layers of all ranges, in order: which one of the source each layer of the new model is."""
    return tuple(chain.from_iterable(ranges))
