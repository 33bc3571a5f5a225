"""Agents from the launcher's side: asked at once, lost, and gone at the end. All of them run on this machine."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsllm.errors import UserError
from dsllm.launch import agent, hosts
from dsllm.launch.hosts import SSH_OPTIONS, Agent, HostError, Hosts, on_this_machine, over_ssh

NAMES = ["a", "b", "c"]


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(NAMES, on_this_machine, tmp_path) as asked:
        yield asked


def start(launch: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "DSLLM_LAUNCH": launch, "RANK": "0"}
    return subprocess.Popen(["sleep", "600"], env=environment, start_new_session=True)


def wait_until_lost(one: Agent) -> None:
    deadline = time.monotonic() + 10
    while not one.is_lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert one.is_lost


def test_all_are_asked_and_answer_in_their_order(three: Hosts) -> None:
    assert three.ask_all("ping") == {name: True for name in NAMES}
    assert list(three.ask_all("ping")) == NAMES
    assert three.lost() == []


def test_each_is_asked_with_its_own_arguments_and_who_is_not_named_is_not_asked(three: Hosts) -> None:
    each = {"c": {"folder": "/"}, "a": {"folder": "/tmp"}}
    answers = three.ask_all("run", each=each, command=["pwd"], environment={}, limit=5)
    assert {name: answer["stdout"] for name, answer in answers.items()} == {"c": "/\n", "a": "/tmp\n"}


def test_they_are_asked_at_once(three: Hosts) -> None:
    started = time.monotonic()
    three.ask_all("run", command=["sleep", "1"], environment={}, folder="/", limit=5)
    assert time.monotonic() - started < 2.5


def test_an_error_of_one_is_its_answer(three: Hosts) -> None:
    each = {"a": {"folder": "/"}, "b": {"folder": "/nowhere"}}
    answers = three.ask_all("run", each=each, command=["pwd"], environment={}, limit=5)
    assert answers["a"]["status"] == 0
    assert isinstance(answers["b"], HostError)
    assert str(answers["b"]).startswith("b: FileNotFoundError")


def test_no_answer_in_time_is_an_error_and_a_late_one_disturbs_nothing(three: Hosts) -> None:
    one = three.agents["a"]
    one.ask("ping")  # the first answer may take a minute
    with pytest.raises(HostError, match=r"a: no answer within 0\.2 s"):
        one.ask("run", 0.2, command=["sleep", "1"], environment={}, folder="/", limit=5)
    assert one.ask("ping") is True


def test_who_is_killed_is_lost_with_the_status_and_the_others_answer(three: Hosts) -> None:
    three.ask_all("ping")
    three.agents["b"]._process.kill()
    wait_until_lost(three.agents["b"])
    (lost,) = three.lost()
    assert (lost.host, lost.status, str(lost)) == ("b", -signal.SIGKILL, "b: ended with status -9")
    answers = three.ask_all("ping")
    assert (answers["a"], answers["c"]) == (True, True)
    assert isinstance(answers["b"], HostError)


def test_who_is_killed_while_it_is_asked_answers_at_once(three: Hosts) -> None:
    killed = three.agents["a"]
    assert killed.ask("ping")
    parent = f"import os, signal, time; time.sleep(0.3); os.kill({killed._process.pid}, signal.SIGKILL); time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(HostError, match="a: ended with status -9"):
        killed.ask("run", 30, command=[sys.executable, "-c", parent], environment={}, folder="/", limit=30)
    assert time.monotonic() - started < 10


def test_a_way_that_leads_nowhere_is_told_in_its_own_last_words(tmp_path: Path) -> None:
    def way(host: str, line: str) -> list[str]:
        return ["sh", "-c", f"echo banner >&2; echo 'ssh: {host}: no such name' >&2; exit 255"]

    with Hosts(["nowhere"], way, tmp_path) as asked:
        answer = asked.ask_all("ping")["nowhere"]
        assert (str(answer), answer.status) == ("nowhere: ssh: nowhere: no such name", 255)


def test_a_folder_or_python_that_is_not_there_is_told(tmp_path: Path) -> None:
    with Hosts(["a"], on_this_machine, tmp_path / "nothing") as asked:
        assert "nothing" in str(asked.ask_all("ping")["a"])
    with Hosts(["a"], on_this_machine, tmp_path, python="/no/python") as asked:
        assert "/no/python" in str(asked.ask_all("ping")["a"])


def test_a_way_that_is_not_installed_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-ssh: not installed here; hosts are asked with it: install it, or choose"):
        Hosts(["a"], lambda host, line: ["no-ssh", host, line], tmp_path)


def test_what_a_login_script_prints_is_no_answer(tmp_path: Path) -> None:
    def way(host: str, line: str) -> list[str]:
        return ["sh", "-c", f"echo Welcome; echo '{{\"id\": 1}}' 7 []; {line}"]

    with Hosts(["a"], way, tmp_path) as asked:
        assert asked.ask_all("ping") == {"a": True}


def test_a_folder_and_python_with_spaces_and_quotes_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "it's a $folder"
    folder.mkdir()
    (folder / "py thon").symlink_to(sys.executable)
    with Hosts(["a"], on_this_machine, folder, python=str(folder / "py thon")) as asked:
        answer = asked.agents["a"].ask("run", command=["pwd"], environment={}, folder=".", limit=5)
        assert answer["stdout"] == f"{folder}\n"


def test_at_the_end_they_and_what_they_guard_are_gone(tmp_path: Path) -> None:
    launch = secrets.token_hex(8)
    rank = start(launch)
    with Hosts(NAMES, on_this_machine, tmp_path) as asked:
        asked.ask_all("guard", launch=launch)
        processes = [one._process for one in asked.agents.values()]
    assert rank.wait(5) == -signal.SIGKILL
    assert [process.poll() for process in processes] == [0, 0, 0]


def test_two_launches_on_one_host_do_not_end_each_other(tmp_path: Path) -> None:
    launches = [secrets.token_hex(8), secrets.token_hex(8)]
    ranks = [start(launch) for launch in launches]
    with Hosts(["a"], on_this_machine, tmp_path) as second:
        second.ask_all("guard", launch=launches[1])
        with Hosts(["a"], on_this_machine, tmp_path) as first:
            first.ask_all("guard", launch=launches[0])
            assert first.ask_all("send_signal", launch=launches[0], number=0) == {"a": 1}
        assert ranks[0].wait(5) == -signal.SIGKILL
        assert ranks[1].poll() is None
        assert second.ask_all("ping") == {"a": True}
    assert ranks[1].wait(5) == -signal.SIGKILL


def test_an_agent_that_hangs_does_not_hold_the_launcher_up_at_the_end(tmp_path: Path) -> None:
    asked = Hosts(["a"], on_this_machine, tmp_path)
    asked.ask_all("ping")
    process = asked.agents["a"]._process
    os.kill(process.pid, signal.SIGSTOP)
    asked.close(seconds=0.5)
    assert process.poll() == -signal.SIGKILL


def test_an_agent_that_hangs_is_lost_after_a_while_and_is_not_when_it_answers_again(tmp_path: Path) -> None:
    """Silence is counted in pings that nobody answers: here the test sends them."""
    with Hosts(["a", "b"], on_this_machine, tmp_path) as asked:
        asked.ask_all("ping")
        hanging = asked.agents["a"]
        os.kill(hanging._process.pid, signal.SIGSTOP)
        for _ in range(3):
            hanging.note()
        assert asked.agents["b"].ask("ping")
        assert [str(error) for error in asked.lost(silent_seconds=10)] == ["a: no answer for 10 s"]
        assert asked.lost() == []
        os.kill(hanging._process.pid, signal.SIGCONT)
        assert hanging.ask("ping")
        assert asked.lost(silent_seconds=10) == []


def test_python_that_keeps_its_folder_off_the_path_starts_an_agent_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    with Hosts(["a"], on_this_machine, tmp_path) as asked:
        assert asked.ask_all("ping") == {"a": True}


def test_who_is_left_out_is_gone_and_asked_no_more(three: Hosts) -> None:
    process = three.agents["b"]._process
    three.leave_out(["b"])
    assert process.poll() == 0
    assert three.ask_all("ping") == {"a": True, "c": True}


def test_agents_find_packages_where_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/a b:/c")
    with Hosts(["a"], on_this_machine, tmp_path) as asked:
        command = ["sh", "-c", "echo $PYTHONPATH"]
        answer = asked.agents["a"].ask("run", command=command, environment={}, folder="/", limit=5)
        assert answer["stdout"] == "/a b:/c\n"


def test_no_file_of_the_runs_folder_is_a_module_to_an_agent(tmp_path: Path) -> None:
    for name in ("json", "socket", "fcntl", "glob"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    with Hosts(["a"], on_this_machine, tmp_path) as asked:
        assert asked.ask_all("ping") == {"a": True}


def test_the_launcher_is_heard_of_more_often_than_an_agent_waits() -> None:
    assert 3 * hosts.PING_SECONDS < agent.SILENT_SECONDS


def test_pings_go_out_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With agents that wait 1 s and a launcher that writes every 0.2 s: none ends in 3 s."""
    impatient = tmp_path / "agent.py"
    usual = f"\nSILENT_SECONDS = {agent.SILENT_SECONDS}\n"
    impatient.write_text(hosts.SOURCE.read_text().replace(usual, "\nSILENT_SECONDS = 1.0\n"))
    assert "SILENT_SECONDS = 1.0" in impatient.read_text()
    monkeypatch.setattr(hosts, "SOURCE", impatient)
    monkeypatch.setattr(hosts, "PING_SECONDS", 0.2)
    with Hosts(["a"], on_this_machine, tmp_path) as asked:
        time.sleep(3)
        assert asked.ask_all("ping") == {"a": True}


def test_ssh_asks_no_questions_and_notices_a_host_that_is_cut_off() -> None:
    command = over_ssh("worker-1", "echo $HOME")
    assert command == ["ssh", *SSH_OPTIONS, "worker-1", "echo $HOME"]
    assert {"BatchMode=yes", "ServerAliveInterval=15", "ServerAliveCountMax=3"} <= set(command)
