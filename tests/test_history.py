"""The history of a run: every event once, whatever a killed process left behind."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsllm.launch.history import History, append_event, num_roll_backs, read_history, skipped_batches

ROOT = Path(__file__).parents[1]

APPENDS = """
import sys
from pathlib import Path
from dsllm.launch.history import append_event
for number in range(200):
    append_event(Path(sys.argv[1]), {"event": sys.argv[2], "step": number, "filling": "x" * 500})
"""


def test_an_event_is_a_line_with_time_name_and_step(tmp_path: Path) -> None:
    history = History(tmp_path / "run" / "history.jsonl", writes=True)
    history.append("started", 0, world_size=2)
    history.append("spike", 7, loss=9.5)
    first, second = read_history(tmp_path / "run" / "history.jsonl")
    assert (first["event"], first["step"], first["world_size"]) == ("started", 0, 2)
    assert (second["event"], second["step"], second["loss"]) == ("spike", 7, 9.5)
    age = datetime.now(timezone.utc) - datetime.fromisoformat(second["time"])
    assert 0 <= age.total_seconds() < 60


def test_ranks_other_than_0_write_nothing(tmp_path: Path) -> None:
    History(tmp_path / "history.jsonl", writes=False).append("started", 0)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_history_has_no_events(tmp_path: Path) -> None:
    assert read_history(tmp_path / "history.jsonl") == []
    assert skipped_batches([]) == ()
    assert num_roll_backs([]) == 0


@pytest.mark.parametrize("torn", [b'{"event": "spi', b"\xff\xfe", b"\x00\x00", b'"spike"', b"{}"])
def test_a_torn_last_line_is_no_event_and_does_not_swallow_the_next(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "history.jsonl"
    append_event(path, {"event": "started", "step": 0})
    with path.open("ab") as file:
        file.write(torn)
    assert [event["event"] for event in read_history(path)] == ["started"]
    append_event(path, {"event": "resumed", "step": 0})
    assert [event["event"] for event in read_history(path)] == ["started", "resumed"]


@given(st.integers(0, 200))
def test_cut_anywhere_all_whole_lines_are_read(tmp_path_factory: pytest.TempPathFactory, kept: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "history.jsonl"
    for step in range(4):
        append_event(path, {"event": "spike", "step": step})
    content = path.read_bytes()[:kept]
    path.write_bytes(content)
    whole = content.count(b"\n") + content.endswith(b"}")
    assert [event["step"] for event in read_history(path)] == list(range(whole))


def test_two_processes_append_to_one_file_without_losing_a_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", APPENDS, path, name], cwd=ROOT) for name in ("a", "b")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    events = read_history(path)
    for name in ("a", "b"):
        assert [event["step"] for event in events if event["event"] == name] == list(range(200))


def test_the_last_event_that_names_them_says_what_is_skipped() -> None:
    events = [
        {"event": "started", "step": 0, "skipped_batches": []},
        {"event": "rolled_back", "step": 9, "to_step": 4, "skipped_batches": [8]},
        {"event": "rolled_back", "step": 30, "to_step": 28, "skipped_batches": [8, 30]},
        {"event": "spike", "step": 40},
    ]
    assert skipped_batches(events) == (8, 30)
    assert num_roll_backs(events) == 2
    assert skipped_batches([*events, {"event": "started", "step": 0, "skipped_batches": []}]) == ()
