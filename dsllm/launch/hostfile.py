"""DeepSpeed's hostfile, read strictly: a mistake in it must not become a run on the wrong machines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsllm.errors import UserError

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>[0-9]{1,9})")


@dataclass(frozen=True)
class Host:
    """A machine that runs ranks."""

    name: str
    """What ssh reaches it by."""
    slots: int
    """Ranks that it runs: its GPUs."""
    chosen: tuple[int, ...] | None = None
    """Which of its GPUs, ascending, where they are not simply the first `slots`."""

    @property
    def slot_ids(self) -> tuple[int, ...]:
        """The GPUs of its ranks, by local rank: numbers among those that a session there may use."""
        return tuple(range(self.slots)) if self.chosen is None else self.chosen


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
        if host.name.lower() in hosts:  # DNS and ssh know no case
            raise UserError(
                f"{source}, line {number}: host '{host.name}' is listed twice; add its slots up in one line"
            )
        hosts[host.name.lower()] = host
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


def select_hosts(
    hosts: Sequence[Host], include: str | None, exclude: str | None, source: str = "the hostfile"
) -> list[Host]:
    """The hosts and slots that `--include` keeps, or that `--exclude` leaves, in the order of `hosts`.

    Both are in DeepSpeed's syntax: `worker-0@worker-1:0,2` is all of worker-0, and slots 0 and 2 of worker-1. `source`
    names in messages where the hosts are from.

    Raises UserError where a host or a slot is not among them, or none is left.
    """
    refuse_two_choices(include, exclude)
    text = include if exclude is None else exclude
    if text is None:
        return list(hosts)
    option = "--include" if exclude is None else "--exclude"
    slots = {host.name: host.slot_ids for host in hosts}
    named = _named_slots(text, option, slots, source)
    if option == "--include":
        kept = named
    else:
        kept = {name: tuple(id for id in ids if id not in named.get(name, ())) for name, ids in slots.items()}
    selected = [_with_slots(host, kept[host.name]) for host in hosts if kept.get(host.name)]
    if not selected:
        raise UserError(f"{option}: given '{text}', which leaves no slot of {source}; leave one for the run")
    return selected


def refuse_two_choices(
    include: str | None, exclude: str | None, num_nodes: int | None = None, num_gpus: int | None = None
) -> None:
    """Raises UserError where hosts are chosen in two ways at once, as DeepSpeed's launcher does."""
    by_name = [option for option, given in (("--include", include), ("--exclude", exclude)) if given is not None]
    by_number = [
        option for option, given in (("--num-nodes", num_nodes), ("--num-gpus", num_gpus)) if given is not None
    ]
    given = by_name + by_number
    if by_name and len(given) > 1:
        raise UserError(f"{given[0]}: given with {given[1]}; either chooses hosts and slots alone; remove one")


def _named_slots(
    text: str, option: str, slots: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, tuple[int, ...]]:
    """The slots that the text of an option names, by host; every one of a host that is named without any."""
    named: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        name, ids = _parse_part(part, option, slots)
        if name not in slots:
            raise UserError(f"{option}: given host '{name}', which {source} does not list; {_nearest(name, slots)}")
        missing = [id for id in ids or () if id not in slots[name]]
        if missing:
            raise UserError(
                f"{option}: given slot {missing[0]} of host '{name}', which has {_listed(slots[name])}; "
                "slots count from 0"
            )
        added = slots[name] if ids is None else ids
        twice = set(named.get(name, ())).intersection(added) or {id for id in added if added.count(id) > 1}
        if twice:
            raise UserError(f"{option}: slot {min(twice)} of host '{name}' is named twice; name each once")
        named[name] = tuple(sorted((*named.get(name, ()), *added)))
    return named


def _parse_part(part: str, option: str, known: Mapping[str, object]) -> tuple[str, tuple[int, ...] | None]:
    """Host and slots of `worker-1:0,2`; None for the slots of `worker-1`, and of an IPv6 address that is known."""
    name, colon, listed = part.rpartition(":")
    if not colon or part in known:
        name, listed = part, ""
    ids = listed.split(",") if name != part else []
    if not name or not all(re.fullmatch("[0-9]{1,9}", id) for id in ids):
        raise UserError(
            f"{option}: given '{part}'; hosts are separated by @, and have slots after a colon, "
            "as in worker-0@worker-1:0,2"
        )
    return name, tuple(map(int, ids)) if ids else None


def _with_slots(host: Host, ids: tuple[int, ...]) -> Host:
    return Host(host.name, len(ids), None if ids == tuple(range(len(ids))) else ids)


def _nearest(name: str, known: Mapping[str, object]) -> str:
    from difflib import get_close_matches  # only ever needed on the way to an error

    near = get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"it begins with '{next(iter(known))}'"


def _listed(ids: tuple[int, ...]) -> str:
    """`slots 0-7`, or each of them where they have gaps."""
    if len(ids) > 1 and ids == tuple(range(ids[0], ids[-1] + 1)):
        return f"slots {ids[0]}-{ids[-1]}"
    return f"slot {ids[0]}" if len(ids) == 1 else f"slots {','.join(map(str, ids))}"
