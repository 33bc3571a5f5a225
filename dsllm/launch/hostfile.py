"""DeepSpeed's hostfile, read strictly: a mistake in it must not become a run on the wrong machines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dsllm.errors import UserError

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\d+)")


@dataclass(frozen=True)
class Host:
    """A machine that runs ranks."""

    name: str
    """What ssh reaches it by."""
    slots: int
    """Ranks that it runs: its GPUs."""


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a hostfile, in order.

    Raises UserError where the file is missing: DeepSpeed would warn, and train on this machine alone.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such hostfile; name one that exists, or leave --hostfile out") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; a hostfile holds lines such as `worker-1 slots=8`") from error
    except OSError as error:
        raise UserError(f"{path}: the hostfile cannot be read: {error.strerror}") from error
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, source: str) -> list[Host]:
    """The hosts in a hostfile's text: a line `name slots=N` each; empty lines and what follows a `#` are left out.

    Raises UserError with the number of the first line that is wrong.
    """
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        host = _parse_line(content, f"{source}, line {number}")
        if host.name in hosts:
            raise UserError(
                f"{source}, line {number}: host '{host.name}' is listed twice; add its slots up in one line"
            )
        hosts[host.name] = host
    if not hosts:
        raise UserError(f"{source}: the hostfile lists no host; add a line such as `worker-1 slots=8`")
    return list(hosts.values())


def _parse_line(content: str, source: str) -> Host:
    match = _LINE.fullmatch(content)
    if match is None:
        raise UserError(f"{source}: given '{content}'; a line is a name and its slots, such as `worker-1 slots=8`")
    slots = int(match["slots"])
    if slots < 1:
        raise UserError(f"{source}: given slots={slots}; must be at least 1; remove the line to leave the host out")
    return Host(match["name"], slots)
