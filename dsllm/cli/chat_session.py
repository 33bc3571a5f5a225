"""A conversation on a terminal, or on a pipe: lines in, answers out; a word about anything else goes to stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dsllm.errors import UserError

if TYPE_CHECKING:
    from dsllm.model.chat import Conversation

HELP = """/reset      forget what was said
/save FILE  write what was said to a file
/help       show this
/quit       end, as Ctrl-D does; Ctrl-C stops an answer"""


def talk(conversation: Conversation) -> None:
    """Answer line after line. On a terminal mistakes are told and Ctrl-C stops an answer; elsewhere both end it."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        note("/help has the commands; Ctrl-D ends")
    for line in _typed_lines() if is_terminal else _piped_lines():
        try:
            if not respond(conversation, line):
                return
        except UserError as error:
            if not is_terminal:
                raise
            note(str(error))
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            typer.echo()


def respond(conversation: Conversation, line: str) -> bool:
    """Answer a line, or do what it commands. Returns whether the session goes on. Raises UserError."""
    command, _, argument = line.strip().partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        conversation.reset()
        note("forgotten")
    elif command == "/save":
        save(conversation, argument.strip())
    elif command == "/help":
        note(HELP)
    elif command.startswith("/"):
        raise UserError(f"{command}: no such command; /help shows those there are")
    elif command:
        answer(conversation, line.strip())
    return True


def answer(conversation: Conversation, said: str) -> None:
    """Print the model's answer as it is written."""
    if num_dropped := conversation.say(said):
        note(f"the context is full: the oldest {num_dropped} turns fell out of it")
    conversation.answer(lambda piece: typer.echo(piece, nl=False))
    typer.echo()


def save(conversation: Conversation, file: str) -> None:
    """Write what was said. Raises UserError without a file, or for one that is there."""
    path = Path(file).expanduser()
    if not file or path.exists():
        given = f"{file}, which is there already" if file else "no file"
        raise UserError(f"/save: given {given}; name a new one, as in /save chat.txt")
    try:
        path.write_text(conversation.transcript(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"/save: given {file}, which cannot be written: {error.strerror}; name another") from error
    note(f"{len(conversation.turns)} turns in {file}")


def note(text: str) -> None:
    """A word that is no part of the conversation."""
    typer.secho(text, dim=True, err=True)


def _typed_lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:  # leaves the line, as in a shell
            typer.echo()


def _piped_lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", errors="replace")
