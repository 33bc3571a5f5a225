"""Whether the ranks that were started are those that were meant: a run on fewer would look like any other, for days."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from dsllm.errors import UserError
from dsllm.launch.placement import Place

EXPECTED = "DSLLM_WORLD_SIZE"
"""How many ranks dsllm launch has asked for."""
NO_HOSTFILE = ("/job/hostfile", os.devnull)
"""What `deepspeed` takes for its hostfile where none is given (deepspeed/launcher/runner.py), and what says on purpose
that there is none."""


def check_world(place: Place, environment: Mapping[str, str]) -> None:
    """Raises UserError where another number of ranks was started than was asked for, in `environment` or of DeepSpeed.

    Before the ranks meet: those of another world may wait for ever for one that was never started.
    """
    expected = environment.get(EXPECTED)
    if expected is not None and expected != str(place.world_size):
        raise UserError(
            f"{EXPECTED}: given {expected}, and {place.launcher} started {place.world_size} ranks; they must be the "
            f"same; see that it starts them on every host, or unset {EXPECTED}"
        )
    if (hostfile := missing_hostfile()) is not None:
        raise UserError(
            f"deepspeed was given --hostfile {hostfile}, which is not there, and started {place.world_size} ranks on "
            "this machine alone; correct the path, or leave --hostfile out"
        )


def missing_hostfile() -> str | None:
    """The hostfile that the `deepspeed` above this process was given, where there is no such file.

    DeepSpeed warns of it, and trains here alone.
    """
    for ancestor in ancestors(os.getpid()):
        if (words := deepspeed_words(ancestor.words)) is not None:
            given = hostfile_in(words)
            return given if given is not None and _is_missing(given, ancestor.cwd) else None
    return None


def _is_missing(hostfile: str, cwd: Path) -> bool:
    return hostfile not in NO_HOSTFILE and not (cwd / hostfile).is_file()


class Ancestor(NamedTuple):
    """A process above this one."""

    words: list[str]
    """Of its command line."""
    cwd: Path


def ancestors(pid: int) -> Iterator[Ancestor]:
    """Those above `pid`, nearest first, up to one that cannot be seen; none where there is no /proc."""
    while True:
        try:
            # the name, in brackets, may hold anything; the parent's number is the second field behind it
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="surrogateescape").split("\0")[:-1]
            yield Ancestor(words, Path(f"/proc/{pid}/cwd").resolve(strict=True))
        except (OSError, ValueError):
            return


def deepspeed_words(words: list[str]) -> list[str] | None:
    """What follows on the name of DeepSpeed's launcher in a command line; None where it is another command."""
    for index, word in enumerate(words[:4]):  # behind python, and its options
        is_module = word == "deepspeed.launcher.runner" and words[index - 1] == "-m"
        if is_module or Path(word).name in ("deepspeed", "deepspeed.pt", "ds"):
            return words[index + 1 :]
    return None


def hostfile_in(words: list[str]) -> str | None:
    """What -H or --hostfile gives; as argparse has it, cut short too, and the last of several."""
    given = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.endswith(".py"):
            break  # what follows is the script's own
        option, equals, value = word.partition("=")
        if option.startswith("--ho") and "--hostfile".startswith(option):
            given = value if equals else following
        elif word.startswith("-H"):
            given = word[2:] or following
    return given
