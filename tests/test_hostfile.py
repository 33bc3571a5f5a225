"""Hostfiles: DeepSpeed's format, with a line number for every mistake."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dsllm.errors import UserError
from dsllm.launch.hostfile import Host, parse_hostfile, read_hostfile, refuse_two_choices, select_hosts

EXAMPLES = Path(__file__).parent.parent / "hostfiles"
HOSTS = [Host("worker-0", 4), Host("worker-1", 4), Host("worker-2", 2)]


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_every_shipped_hostfile_is_valid(path: Path) -> None:
    assert read_hostfile(path)


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_deepspeed_reads_the_same_in_every_shipped_hostfile(path: Path) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert runner.fetch_hostfile(str(path)) == {host.name: host.slots for host in read_hostfile(path)}


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("text", ["worker-2@worker-0:2,0", "worker-1:3", "worker-0:3@worker-0:1"])
def test_deepspeed_selects_the_same(text: str, option: str) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    chosen = (text, "") if option == "include" else ("", text)
    expected = runner.parse_inclusion_exclusion({host.name: host.slots for host in HOSTS}, *chosen)
    selected = select_hosts(HOSTS, *(choice or None for choice in chosen))
    assert [(host.name, list(host.slot_ids)) for host in selected] == list(expected.items())


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
        ("Node slots=8\nnode slots=8", "hosts, line 2: host 'node' is listed twice"),
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


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("worker-1", [Host("worker-1", 4)]),
        ("worker-1@worker-0", [Host("worker-0", 4), Host("worker-1", 4)]),
        ("worker-2@worker-0:2,0", [Host("worker-0", 2, (0, 2)), Host("worker-2", 2)]),
        ("worker-0:3@worker-0:1", [Host("worker-0", 2, (1, 3))]),
        ("worker-0:0,1", [Host("worker-0", 2)]),
    ],
)
def test_include_keeps_hosts_and_slots_in_the_order_of_the_hostfile(include: str, expected: list[Host]) -> None:
    assert select_hosts(HOSTS, include, None) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("worker-1", [Host("worker-0", 4), Host("worker-2", 2)]),
        ("worker-1@worker-0:0", [Host("worker-0", 3, (1, 2, 3)), Host("worker-2", 2)]),
        ("worker-2:0,1@worker-1:3", [Host("worker-0", 4), Host("worker-1", 3)]),
    ],
)
def test_exclude_leaves_the_others(exclude: str, expected: list[Host]) -> None:
    assert select_hosts(HOSTS, None, exclude) == expected


def test_without_a_choice_every_host_is_kept() -> None:
    assert select_hosts(HOSTS, None, None) == HOSTS


def test_slot_ids_are_the_first_ones_unless_others_are_chosen() -> None:
    assert (Host("a", 3).slot_ids, Host("a", 2, (1, 3)).slot_ids) == ((0, 1, 2), (1, 3))


def test_an_ipv6_address_is_no_host_with_a_slot() -> None:
    hosts = [Host("fd00::1", 2), Host("fd00::2", 2)]
    assert select_hosts(hosts, "fd00::2", None) == [Host("fd00::2", 2)]
    assert select_hosts(hosts, "fd00::2:1", None) == [Host("fd00::2", 1, (1,))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wroker-1", "given host 'wroker-1', which hosts does not list; did you mean 'worker-1'?"),
        ("gpu7", "given host 'gpu7', which hosts does not list; it begins with 'worker-0'"),
        ("worker-0:1,4", "given slot 4 of host 'worker-0', which has slots 0-3; slots count from 0"),
        ("worker-0:1,1", "slot 1 of host 'worker-0' is named twice; name each once"),
        ("worker-0@worker-0:2", "slot 2 of host 'worker-0' is named twice; name each once"),
        ("", "given ''; hosts are separated by @, and have slots after a colon, as in worker-0@worker-1:0,2"),
        ("worker-0@", "given ''; hosts are separated by @"),
        (":1", "given ':1'; hosts are separated by @"),
        ("worker-0:", "given 'worker-0:'; hosts are separated by @"),
        ("worker-0:1,,2", "given 'worker-0:1,,2'; hosts are separated by @"),
        ("worker-0:0-3", "given 'worker-0:0-3'; hosts are separated by @"),
        ("worker-0,worker-1", "given host 'worker-0,worker-1', which hosts does not list; did you mean 'worker-1'?"),
    ],
)
@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_a_mistaken_choice_is_one_line_with_the_remedy(text: str, message: str, option: str) -> None:
    chosen = (text, None) if option == "--include" else (None, text)
    with pytest.raises(UserError) as refusal:
        select_hosts(HOSTS, *chosen, source="hosts")
    assert str(refusal.value).startswith(f"{option}: {message}")
    assert "\n" not in str(refusal.value)


def test_a_host_with_one_or_with_scattered_slots_says_which() -> None:
    with pytest.raises(UserError, match="which has slot 3; slots count from 0"):
        select_hosts([Host("a", 1, (3,))], "a:0", None)
    with pytest.raises(UserError, match="which has slots 0,2; slots count from 0"):
        select_hosts([Host("a", 2, (0, 2))], "a:1", None)


def test_leaving_out_every_host_is_refused() -> None:
    with pytest.raises(UserError, match="--exclude: given 'a', which leaves no slot of hosts; leave one for the run"):
        select_hosts([Host("a", 2)], None, "a", source="hosts")


@pytest.mark.parametrize(
    ("include", "exclude", "num_nodes", "num_gpus", "message"),
    [
        ("a", "b", None, None, "--include: given with --exclude; either chooses hosts and slots alone; remove one"),
        ("a", None, 1, None, "--include: given with --num-nodes; either"),
        (None, "a", None, 2, "--exclude: given with --num-gpus; either"),
    ],
)
def test_hosts_are_chosen_in_one_way(
    include: str | None, exclude: str | None, num_nodes: int | None, num_gpus: int | None, message: str
) -> None:
    with pytest.raises(UserError) as refusal:
        refuse_two_choices(include, exclude, num_nodes, num_gpus)
    assert str(refusal.value).startswith(message)


def test_numbers_alone_and_a_choice_alone_are_no_conflict() -> None:
    refuse_two_choices(None, None, num_nodes=2, num_gpus=8)
    refuse_two_choices("a", None)


def test_a_thousand_hosts_are_read_and_filtered_at_once() -> None:
    text = "".join(f"node-{index:04} slots=8\n" for index in range(1000))
    named = "@".join(f"node-{index:04}:0,2" for index in range(1000))
    started = time.perf_counter()
    hosts = parse_hostfile(text, "hosts")
    included, excluded = select_hosts(hosts, named, None), select_hosts(hosts, None, named)
    seconds = time.perf_counter() - started
    assert {host.slot_ids for host in included} == {(0, 2)}
    assert {host.slot_ids for host in excluded} == {(1, 3, 4, 5, 6, 7)}
    assert seconds < 0.5  # 30 ms alone on the machine
