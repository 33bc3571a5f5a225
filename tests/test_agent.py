"""The agent on a host: real ones on this machine, on processes that a test starts."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsllm.launch import agent
from dsllm.launch.hosts import BOOTSTRAP, SOURCE, Agent, HostError, on_this_machine

PYTHONS = sorted(Path.home().glob(".pyenv/versions/3.1[0-9]*/bin/python"))
SHELL_WITH_A_CHILD = ["sh", "-c", "sleep 600 & echo started; wait"]


@pytest.fixture
def launch() -> Iterator[str]:
    """A launch's id. Nothing of it is left on this machine afterwards."""
    launch = secrets.token_hex(8)
    yield launch
    agent.sweep(launch)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Agent]:
    """An agent on this machine."""
    one = Agent("here", on_this_machine, tmp_path, sys.executable)
    yield one
    one.close()
    one.wait(10)


def start(launch: str, command: list[str] | None = None, **variables: str) -> subprocess.Popen[bytes]:
    """A process of the launch, in a session of its own."""
    environment = {**os.environ, "DSLLM_LAUNCH": launch, **variables}
    return subprocess.Popen(
        command or ["sleep", "600"], env=environment, stdout=subprocess.PIPE, start_new_session=True
    )


def start_with_child(launch: str, **variables: str) -> tuple[subprocess.Popen[bytes], int]:
    """A process of the launch, and the process id of one that it has started."""
    process = start(launch, SHELL_WITH_A_CHILD, **variables)
    assert process.stdout is not None
    process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, int(children[0])


def wait_for(is_so: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_so()


class Launcher:
    """Talks to an agent line by line, and sends no pings: what the agent does about silence shows."""

    def __init__(self, source: str) -> None:
        code = source.encode()
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", BOOTSTRAP.format(size=len(code))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(code)

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"id": 1, "do": do, **arguments}).encode() + b"\n")
        self.process.stdin.flush()
        lines = iter(self.process.stdout.readline, b"")
        return next(json.loads(line)["result"] for line in lines if line.strip())


@pytest.fixture
def impatient() -> Iterator[Launcher]:
    """The launcher of an agent that calls a second silence."""
    source = SOURCE.read_text()
    assert source.count("\nSILENT_SECONDS = 90.0\n") == 1
    launcher = Launcher(source.replace("\nSILENT_SECONDS = 90.0\n", "\nSILENT_SECONDS = 1.0\n"))
    yield launcher
    launcher.process.kill()
    launcher.process.wait()


# --- answers ---------------------------------------------------------------------------------------------------------


def test_it_answers(here: Agent) -> None:
    assert here.ask("ping") is True
    assert not here.is_lost


def test_an_error_comes_back_in_its_own_words_and_the_agent_goes_on(here: Agent) -> None:
    with pytest.raises(HostError, match="here: KeyError: 'nothing'"):
        here.ask("nothing")
    with pytest.raises(HostError, match=r"here: FileNotFoundError: .*'/nowhere'"):
        here.ask("run", command=["true"], environment={}, folder="/nowhere", limit=5)
    assert here.ask("ping") is True


def test_it_learns_more_answers(here: Agent) -> None:
    here.ask("learn", source="def double(number):\n    return 2 * number\nANSWERS = {'double': double}")
    assert here.ask("double", number=21) == 42


@pytest.mark.skipif(not PYTHONS, reason="no other Python versions: pyenv install 3.10 3.12")
@pytest.mark.parametrize("python", PYTHONS, ids=lambda path: path.parts[-3])
def test_it_runs_under_every_python(python: Path, launch: str, tmp_path: Path) -> None:
    one = Agent("here", on_this_machine, tmp_path, str(python))
    process = start(launch)
    one.ask("guard", launch=launch)
    path = one.ask("write_private", launch=launch, text="A=1\n")
    assert one.ask("run", command=["pwd"], environment={}, folder=str(tmp_path), limit=5)["stdout"].strip() == (
        str(tmp_path)
    )
    assert one.ask("addresses")[-1][1].startswith("127.")
    one.close()
    one.wait(10)
    assert process.wait(5) == -signal.SIGKILL
    assert not Path(path).exists()


# --- the processes of a launch ---------------------------------------------------------------------------------------


def test_a_signal_goes_to_ranks_and_not_to_what_they_or_the_launcher_have_started(here: Agent, launch: str) -> None:
    launcher = start(launch)
    rank, loader = start_with_child(launch, RANK="0")
    other = start(launch, RANK="1")
    assert here.ask("send_signal", launch=launch, number=signal.SIGTERM) == 2
    assert (rank.wait(5), other.wait(5)) == (-signal.SIGTERM, -signal.SIGTERM)
    assert launcher.poll() is None
    assert not agent.is_zombie(f"/proc/{loader}"), "a rank ends what it has started itself"


@pytest.mark.parametrize("variable", ["RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"])
def test_ranks_are_known_under_every_launcher(here: Agent, launch: str, variable: str) -> None:
    rank = start(launch, **{variable: "3"})
    assert here.ask("send_signal", launch=launch, number=signal.SIGUSR2) == 1
    assert rank.wait(5) == -signal.SIGUSR2


def test_a_signal_is_for_one_launch_alone(here: Agent, launch: str) -> None:
    other = secrets.token_hex(8)
    process = start(other, RANK="0")
    assert here.ask("send_signal", launch=launch, number=signal.SIGTERM) == 0
    assert process.poll() is None
    agent.sweep(other)


def test_a_sweep_ends_what_is_left_and_says_what_it_was(here: Agent, launch: str) -> None:
    by_environment, child = start_with_child(launch, RANK="0")
    with_file = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", "--environment-file", f"/tmp/dsllm-{launch}/environment"]
    )
    left = here.ask("sweep", launch=launch)
    assert sorted(line.split()[0] for line in left) == sorted([sys.executable, "sh", "sleep"])
    assert (by_environment.wait(5), with_file.wait(5)) == (-signal.SIGKILL, -signal.SIGKILL)
    assert wait_for(lambda: agent.is_zombie(f"/proc/{child}"))
    assert here.ask("sweep", launch=launch) == []


def test_a_sweep_leaves_other_launches_alone(here: Agent, launch: str) -> None:
    other = secrets.token_hex(8)
    process = start(other, RANK="0")
    path = here.ask("write_private", launch=other, text="")
    assert here.ask("sweep", launch=launch) == []
    assert process.poll() is None
    assert Path(path).exists()
    here.ask("sweep", launch=other)
    assert process.wait(5) == -signal.SIGKILL
    assert not Path(path).parent.exists()


def test_what_has_ended_and_is_only_not_collected_is_nothing_left(here: Agent, launch: str) -> None:
    process = start(launch, ["true"])
    assert wait_for(lambda: agent.is_zombie(f"/proc/{process.pid}"))
    assert here.ask("sweep", launch=launch) == []
    process.wait()


def test_where_the_launcher_hangs_up_what_is_guarded_ends_and_the_rest_stays(launch: str, tmp_path: Path) -> None:
    one = Agent("here", on_this_machine, tmp_path, sys.executable)
    other = secrets.token_hex(8)
    rank, bystander = start(launch, RANK="0"), start(other, RANK="0")
    one.ask("guard", launch=launch)
    path = Path(one.ask("write_private", launch=launch, text=""))
    one.close()
    assert rank.wait(5) == -signal.SIGKILL
    one.wait(5)
    assert bystander.poll() is None
    assert not path.parent.exists()
    agent.sweep(other)


def test_where_the_launcher_is_killed_what_is_guarded_ends(launch: str) -> None:
    """The way is the kernel's: the pipes of a dead process are closed."""
    program = (
        "import sys; from pathlib import Path; from dsllm.launch.hosts import Agent, on_this_machine\n"
        "one = Agent('here', on_this_machine, Path('/'), sys.executable)\n"
        f"one.ask('guard', launch='{launch}'); print('guarded', flush=True); sys.stdin.read()"
    )
    root = str(SOURCE.parents[2])
    launcher = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == b"guarded\n"
    rank = start(launch, RANK="0")
    launcher.kill()
    launcher.wait()
    assert rank.wait(5) == -signal.SIGKILL


def test_where_the_launcher_falls_silent_what_is_guarded_ends(impatient: Launcher, launch: str) -> None:
    rank = start(launch, RANK="0")
    impatient.ask("guard", launch=launch)
    assert rank.wait(8) == -signal.SIGKILL
    assert impatient.process.wait(5) == 0


def test_a_line_that_is_no_request_ends_the_agent_with_what_it_guards(impatient: Launcher, launch: str) -> None:
    rank = start(launch, RANK="0")
    impatient.ask("guard", launch=launch)
    assert impatient.process.stdin is not None
    impatient.process.stdin.write(b"junk\n")
    impatient.process.stdin.flush()
    assert rank.wait(0.9) == -signal.SIGKILL, "at once, not for its silence"


def test_a_request_that_hangs_keeps_no_other_from_its_answer_and_not_the_agent_from_its_end(
    tmp_path: Path, launch: str
) -> None:
    one = Agent("here", on_this_machine, tmp_path, sys.executable)
    rank = start(launch, RANK="0")
    one.ask("guard", launch=launch)
    with pytest.raises(HostError, match="no answer within"):
        one.ask("run", 0.2, command=["sleep", "20"], environment={}, folder="/", limit=60)
    started = time.monotonic()
    assert one.ask("ping")
    one.close()
    one.wait(10)
    assert rank.wait(1) == -signal.SIGKILL
    assert time.monotonic() - started < 5


def test_as_long_as_the_launcher_writes_nothing_ends(impatient: Launcher, launch: str) -> None:
    rank = start(launch, RANK="0")
    impatient.ask("guard", launch=launch)
    for _ in range(12):  # 2.4 s
        time.sleep(0.2)
        assert impatient.ask("ping")
    assert rank.poll() is None


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_no_signal_of_a_terminal_or_service_manager_ends_it(here: Agent, number: signal.Signals) -> None:
    here.ask("ping")
    os.kill(here._process.pid, number)  # sh has become the agent by exec
    assert here.ask("ping") is True


# --- private files ---------------------------------------------------------------------------------------------------


def test_a_private_file_is_this_users_alone_whatever_the_umask(tmp_path: Path, launch: str) -> None:
    one = Agent("here", lambda host, line: ["sh", "-c", f"umask 0; {line}"], tmp_path, sys.executable)
    path = Path(one.ask("write_private", launch=launch, text='TOKEN="ä"\n'))
    assert path == Path(f"/tmp/dsllm-{launch}/environment")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text() == 'TOKEN="ä"\n'
    one.close()
    one.wait(5)


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_a_private_folder_that_is_there_already_is_not_trusted(
    here: Agent, launch: str, kind: str, tmp_path: Path
) -> None:
    folder = Path(agent.private_folder(launch))
    if kind == "folder":
        folder.mkdir()
    elif kind == "link":
        folder.symlink_to(tmp_path)
    else:
        folder.touch()
    try:
        with pytest.raises(HostError, match="FileExistsError"):
            here.ask("write_private", launch=launch, text="TOKEN=1")
        assert not list(tmp_path.iterdir())
    finally:
        folder.rmdir() if kind == "folder" else folder.unlink()


# --- ports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_that_is_in_use_is_replaced(here: Agent, family: socket.AddressFamily) -> None:
    if family == socket.AF_INET6 and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with socket.socket(family) as listener:
        listener.bind(("", 0))  # torch listens on every address, of both families
        listener.listen()
        port = listener.getsockname()[1]
        other = here.ask("free_port", preferred=port)
        assert other not in (port, 0)
    assert here.ask("free_port", preferred=port) == port


def test_a_port_greets_with_its_word_until_it_is_left(here: Agent) -> None:
    port = here.ask("free_port", preferred=0)
    here.ask("listen", port=port, word="hello")
    found = here.ask("connect", address="127.0.0.1", port=port, word="hello", patience=5)
    assert found == {"error": None, "interface": "lo", "address": "127.0.0.1", "peer": "127.0.0.1"}
    assert here.ask("connect", address="127.0.0.1", port=port, word="other", patience=5) == (
        {"error": "something else listens there"}
    )
    here.ask("unlisten", port=port)
    assert here.ask("connect", address="127.0.0.1", port=port, word="hello", patience=5) == (
        {"error": "Connection refused"}
    )
    here.ask("listen", port=port, word="again")
    assert here.ask("reach", targets=[["127.0.0.1", port], ["127.0.0.1", 1]], word="again", patience=5)[0]["error"] is (
        None
    )


def test_a_port_is_reached_by_both_families_and_by_ipv4_first(here: Agent) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    port = here.ask("free_port", preferred=0)
    here.ask("listen", port=port, word="hello")
    for address in ("127.0.0.1", "::1"):
        found = here.ask("connect", address=address, port=port, word="hello", patience=5)
        assert (found["error"], found["address"], found["peer"]) == (None, address, address)
    assert here.ask("connect", address="localhost", port=port, word="hello", patience=5)["peer"] == "127.0.0.1"


# --- programs and last words -----------------------------------------------------------------------------------------


def test_a_program_is_told_its_environment_and_folder_and_ends_in_time(here: Agent, tmp_path: Path) -> None:
    done = here.ask(
        "run", command=["sh", "-c", "echo $A; pwd >&2; exit 3"], environment={"A": "b"}, folder=str(tmp_path), limit=5
    )
    assert done == {"status": 3, "stdout": "b\n", "stderr": f"{tmp_path}\n"}
    late = here.ask("run", command=["sh", "-c", "echo so far; exec sleep 60"], environment={}, folder="/", limit=0.5)
    assert late == {"status": None, "stdout": "so far\n", "stderr": ""}


def word(launch: str | None, rank: int, time: float, is_own: bool) -> dict[str, Any]:
    return {"launch": launch, "rank": rank, "time": time, "is_own": is_own, "message": "why"}


def test_last_words_are_those_of_this_launch_first_who_failed_by_themselves(
    here: Agent, launch: str, tmp_path: Path
) -> None:
    logs = tmp_path / "lo[g]s"
    logs.mkdir()
    words = [
        word(launch, 0, 1.0, False),
        word(launch, 1, 3.0, True),
        word(launch, 2, 2.0, True),
        word(None, 3, 0, True),
    ]
    for told in words:
        (logs / f"rank{told['rank']}.ended.json").write_text(json.dumps(told))
    (logs / "rank8.ended.json").write_text('{"launch"')
    for number, foreign in enumerate(("[]", "{}", "7")):
        (logs / f"rank9{number}.ended.json").write_text(foreign)
    found = here.ask("last_words", launch=launch, logs=str(logs))
    assert [told["rank"] for told in found] == [2, 1, 0]


def test_of_many_that_failed_only_the_first_are_told(here: Agent, launch: str, tmp_path: Path) -> None:
    for rank in range(100):
        (tmp_path / f"rank{rank}.ended.json").write_text(json.dumps(word(launch, rank, 100.0 - rank, True)))
    found = here.ask("last_words", launch=launch, logs=str(tmp_path))
    assert [told["rank"] for told in found] == list(range(99, 91, -1))


def test_the_tail_of_a_log_is_its_last_lines(here: Agent, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join(f"{number}\n" for number in range(10_000)) + "unfinished")
    assert here.ask("tail", path=str(log), lines=3) == ["9998", "9999", "unfinished"]
    assert here.ask("tail", path=str(tmp_path / "nothing"), lines=3) == []
