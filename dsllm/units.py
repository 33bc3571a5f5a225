"""Numbers as people read them. Inside dsllm every quantity is a plain count of bytes, seconds or tokens."""

from __future__ import annotations

import math
import re

from dsllm.errors import UserError

GIB = 2**30
MIB = 2**20

_COUNT_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def format_bytes(num_bytes: float) -> str:
    """`1610612736` -> `1.50 GiB`; small numbers in MiB or KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (2**10, "KiB")):
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes:.0f} B"


def format_text_bytes(num_bytes: float) -> str:
    """`12100000` -> `12.1 MB`, in units of a thousand, as text is counted; below a thousand `812 bytes`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:.0f} bytes"


def format_count(count: float) -> str:
    """`124439808` -> `124.4M`; counts under a thousand are printed whole."""
    for unit, suffix in _COUNT_SUFFIXES:
        if abs(count) >= unit:
            return f"{count / unit:.1f}{suffix}"
    return f"{count:g}"


def format_duration(seconds: float) -> str:
    """`5025` -> `1h23m`; `83` -> `1m23s`; `8.3` -> `8.3s`; unknown (not finite) -> `?`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def parse_duration(text: str, name: str) -> float:
    """Seconds of `90s`, `45m`, `3h50m`, `1d2h`, or a plain number of seconds.

    Raises UserError, which names the option `name`, for anything else, and for no time at all.
    """
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    match = re.fullmatch("".join(rf"(?:(?P<{unit}>\d+){unit})?" for unit in units), text + "s" * text.isdecimal())
    seconds = sum(int(match[unit] or 0) * units[unit] for unit in units) if match else 0
    if seconds == 0:
        raise UserError(f"{name}: given '{text}'; must be a time such as 90s, 45m, 3h50m or 1d2h")
    return float(seconds)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
