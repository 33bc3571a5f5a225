"""Hostfiles: DeepSpeed's format, with a line number for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsllm.errors import UserError
from dsllm.launch.hostfile import Host, parse_hostfile, read_hostfile

EXAMPLES = Path(__file__).parent.parent / "hostfiles"


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_every_shipped_hostfile_is_valid(path: Path) -> None:
    assert read_hostfile(path)


def test_hosts_keep_their_order_and_comments_are_left_out() -> None:
    text = "# the big ones\n\nworker-2 slots=8\n  worker-1   slots=4  # shared\n"
    assert parse_hostfile(text, "hosts") == [Host("worker-2", 8), Host("worker-1", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=8\nb", "hosts, line 2: given 'b'; a line is a name and its slots, such as `worker-1 slots=8`"),
        ("a slots=8 max=9", "hosts, line 1: given 'a slots=8 max=9'; a line is a name and its slots"),
        ("a slots=eight", "hosts, line 1: given 'a slots=eight'; a line is a name and its slots"),
        ("\na slots=0", "hosts, line 2: given slots=0; must be at least 1"),
        ("a slots=8\n\na slots=4", "hosts, line 3: host 'a' is listed twice; add its slots up in one line"),
        ("# nothing\n", "hosts: the hostfile lists no host; add a line such as `worker-1 slots=8`"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_hostfile(text, "hosts")
    assert str(refusal.value).startswith(message)


def test_a_missing_hostfile_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such hostfile; name one that exists"):
        read_hostfile(tmp_path / "hosts")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xff\xfe slots=8")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_hostfile(tmp_path / "hosts")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the hostfile cannot be read: Is a directory"):
        read_hostfile(tmp_path)
