"""Hosts that do not answer: what the words of ssh and of the shell mean, and what to do."""

from __future__ import annotations

from dsllm.launch.doctor.finding import Check, Finding
from dsllm.launch.hosts import SSH_FAILED, HostError

NOT_FOUND = (126, 127)
"""Of a shell whose command is not there, or cannot be run."""
IS_DOWN = "see that it is up, in this network, and lets ssh in (firewall), or leave it out: --exclude {host}"
SAID_BY_SSH = (
    ("Connection refused", "start sshd there, or correct its port in ~/.ssh/config"),
    (
        "Could not resolve hostname",
        "correct the name in the hostfile, or make it known in DNS, /etc/hosts or ~/.ssh/config",
    ),
    ("Permission denied", "let ssh in without a password: ssh-copy-id {host}"),
    ("Host key verification failed", "ssh {host} once by hand, and accept its key"),
    ("No route to host", IS_DOWN),
    ("timed out", IS_DOWN),
    ("Network is unreachable", "see that this machine is in its network"),
    ("Connection closed", "see sshd's log there; it may limit connections (MaxStartups) or users (AllowUsers)"),
)


def unreachable(error: HostError, folder: str, python: str, check: Check = "reach") -> Finding:
    """Of a host that has not answered."""
    return Finding(error.host, check, "failed", error.words, _remedy(error, folder, python).format(host=error.host))


def _remedy(error: HostError, folder: str, python: str) -> str:
    if error.status == SSH_FAILED:
        by_hand = "see what ssh {host} true says"
        return next((remedy for words, remedy in SAID_BY_SSH if words in error.words), by_hand)
    if error.status in NOT_FOUND:
        return f"install the same environment there; ranks are started with {_literal(python)}"
    if "SyntaxError" in error.words:
        return f"install the same Python there; {_literal(python)} is too old"
    if error.status is not None and "cd" in error.words:
        return f"make {_literal(folder)} there too, shared or copied; ranks start in it"
    if error.status is None and "no answer" in error.words:
        return "see whether it is overloaded, or a file system hangs there (df), or leave it out: --exclude {host}"
    return "see what ssh {host} true says"


def _literal(text: str) -> str:
    """A path that may hold braces, within a text that is formatted later."""
    return text.replace("{", "{{").replace("}", "}}")
