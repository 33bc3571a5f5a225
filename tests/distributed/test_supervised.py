"""Runs under `dsllm launch` on this machine: what disturbs them, how they go on, and that nothing is left of them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dsllm.launch.history import read_history
from tests.distributed.harness import RankResult, free_port, run_launch
from tests.distributed.test_resume import STEPS, arguments, ranks_of, records
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 150
SECRET = "secret-1"
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun: apt-get install openmpi-bin")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


def launch(
    corpus: Path,
    run: Path,
    *options: str,
    settings: tuple[str, ...] = (),
    meanwhile: Callable[[], None] = lambda: None,
    port: int | None = None,
) -> RankResult:
    """A run of two ranks, with a secret in its environment; `meanwhile` is called in this thread while it runs."""
    results: list[RankResult] = []
    flags = [*arguments(corpus, run, 2, *settings), *options]

    def carry_out() -> None:
        results.append(
            run_launch(
                flags,
                num_ranks=2,
                timeout_seconds=TIMEOUT_SECONDS,
                env={"HF_TOKEN": SECRET},
                check=False,
                port=port,
            )
        )

    thread = threading.Thread(target=carry_out)
    thread.start()
    meanwhile()
    thread.join()
    return results[0]


def after_step(run: Path, step: int, act: Callable[[], None]) -> Callable[[], None]:
    """Do it once the run has recorded so many steps."""

    def wait_and_act() -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(records(run)) < step and time.monotonic() < deadline:
            time.sleep(0.02)
        act()

    return wait_and_act


def rank(run: Path, number: int) -> psutil.Process:
    return next(process for process in ranks_of(run) if process.environ().get("RANK") == str(number))


def launcher(run: Path) -> psutil.Process:
    """The process of dsllm launch itself."""
    return next(
        process
        for process in psutil.process_iter(["cmdline"])
        if str(run) in (line := process.info["cmdline"] or []) and "dsllm.cli.app" in line
    )


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


def events(run: Path, *kinds: str) -> list[str]:
    return [event["event"] for event in read_history(run / "history.jsonl") if event["event"] in kinds]


def causes(run: Path) -> list[str]:
    return [event["cause"] for event in read_history(run / "history.jsonl") if event["event"] == "ended"]


def command_lines() -> str:
    """Of every process of this machine, as any user may read them."""
    lines = []
    for process in psutil.process_iter(["cmdline"]):
        lines += process.info["cmdline"] or []
    return "\n".join(lines)


class Watch:
    """What could be seen of a run while it trained."""

    command_lines = ""
    rank_has_secret = False


@pytest.fixture(scope="module")
def watched() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, watched: Watch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to, but for a port that is in use."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"

    def look() -> None:
        watched.command_lines = command_lines()
        watched.rank_has_secret = rank(run, 1).environ().get("HF_TOKEN") == SECRET

    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        result = launch(corpus, run, meanwhile=after_step(run, 1, look), port=listener.getsockname()[1])
    assert result.returncode == 0, result.launcher_output
    assert result.left_behind == ()
    return run


def test_a_port_in_use_is_replaced_and_the_run_finishes(undisturbed: Path) -> None:
    assert len(records(undisturbed)) == STEPS
    assert events(undisturbed, "launched", "ended", "finished") == ["launched", "finished", "ended"]
    assert causes(undisturbed) == ["finished"]


def test_a_secret_is_on_no_command_line_and_in_no_file_of_the_run(undisturbed: Path, watched: Watch) -> None:
    assert watched.rank_has_secret, "the ranks themselves need it"
    assert str(undisturbed) in watched.command_lines
    assert SECRET not in watched.command_lines
    files = [path for path in undisturbed.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    assert {"passport.json", "rank0.log", "rank1.log", "history.jsonl"} <= {path.name for path in files}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_killed_rank_costs_a_restart_and_not_a_digit_of_any_loss(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kill = after_step(run, 6, lambda: rank(run, 1).send_signal(signal.SIGKILL))
    result = launch(corpus, run, "--max-restarts", "1", meanwhile=kill)
    assert result.returncode == 0, result.launcher_output
    assert result.left_behind == ()
    assert causes(run) == ["lost_rank", "finished"]
    assert events(run, "launched", "finished") == ["launched", "launched", "finished"]
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))
    assert losses(run) == losses(undisturbed)
    assert records(run)[-1]["val_loss"] == records(undisturbed)[-1]["val_loss"]
    assert "starting again in 5.0s, restart 1 of 1" in result.launcher_output


def test_a_mistake_of_the_users_is_one_line_and_not_tried_again(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    missing = f"data.sources=[{{kind: text, path: '{tmp_path}/nothing'}}]"
    result = launch(corpus, run, "--max-restarts", "3", settings=(missing, f"data.directory={tmp_path}/tokens"))
    assert result.returncode == 2, result.launcher_output
    said = [line for line in result.launcher_output.splitlines() if f"{tmp_path}/nothing" in line]
    assert len([line for line in said if "--set" not in line]) == 1, result.launcher_output
    assert "Traceback" not in result.launcher_output
    assert causes(run) == ["user_error"]


def test_sigterm_to_the_launch_saves_and_ends_with_0(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = launch(corpus, run, meanwhile=after_step(run, 5, lambda: launcher(run).send_signal(signal.SIGTERM)))
    assert result.returncode == 0, result.launcher_output
    done = len(records(run))
    assert 5 <= done < STEPS
    assert (run / "checkpoints" / "latest").read_text() == f"global_step{done}"
    assert causes(run) == ["stopped"]
    assert losses(run) == losses(undisturbed)[:done]
    assert result.left_behind == ()


def test_where_the_launch_itself_is_killed_its_ranks_end_within_seconds(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seconds: list[float] = []

    def kill() -> None:
        launcher(run).kill()
        killed = time.monotonic()
        while ranks_of(run) and time.monotonic() < killed + 30:
            time.sleep(0.05)
        seconds.append(time.monotonic() - killed)

    many = "training={train_steps: 100000, precision: bf16}"
    result = launch(corpus, run, settings=(many, "checkpoint.interval=100000"), meanwhile=after_step(run, 2, kill))
    assert result.returncode == -signal.SIGKILL
    assert seconds[0] < 10
    assert result.left_behind == ()


@needs_mpirun
def test_open_mpi_trains_the_same(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = launch(corpus, run, "--launcher", "openmpi")
    assert result.returncode == 0, result.launcher_output
    assert losses(run) == losses(undisturbed)
    assert result.left_behind == ()


@pytest.mark.slow
def test_torchrun_trains_the_same(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = launch(corpus, run, "--launcher", "torchrun")
    assert result.returncode == 0, result.launcher_output
    assert losses(run) == losses(undisturbed)
    assert result.left_behind == ()


@pytest.mark.slow
@needs_mpirun
@pytest.mark.parametrize("name", ["openmpi", "torchrun"])
def test_sigterm_saves_under_every_launcher(corpus: Path, undisturbed: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    stop = after_step(run, 5, lambda: launcher(run).send_signal(signal.SIGTERM))
    result = launch(corpus, run, "--launcher", name, meanwhile=stop)
    assert result.returncode == 0, result.launcher_output
    done = len(records(run))
    assert 5 <= done < STEPS
    assert (run / "checkpoints" / "latest").read_text() == f"global_step{done}"
    assert causes(run) == ["stopped"]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_run_at_once(corpus: Path, tmp_path: Path) -> None:
    """The first asks for the end of a step that never comes: the other rank is stopped."""
    run = tmp_path / "run"

    def press_twice() -> None:
        rank(run, 1).suspend()
        for _ in range(2):
            launcher(run).send_signal(signal.SIGINT)
            time.sleep(2)

    started = time.monotonic()
    many = "training={train_steps: 100000, precision: bf16}"
    result = launch(corpus, run, settings=(many,), meanwhile=after_step(run, 2, press_twice))
    assert time.monotonic() - started < 100
    assert result.left_behind == ()
    assert causes(run) == ["stopped"]


@pytest.mark.slow
def test_a_launcher_that_starts_another_number_of_ranks_is_found_out(corpus: Path, tmp_path: Path) -> None:
    """A wrapper of mpirun that starts one rank of two."""
    wrapper = tmp_path / "bin" / "mpirun"
    wrapper.parent.mkdir()
    real = shutil.which("mpirun") or pytest.skip("needs mpirun: apt-get install openmpi-bin")
    wrapper.write_text(f'#!/bin/sh\nshift 2\nexec {real} -np 1 "$@"\n')
    wrapper.chmod(0o755)
    run = tmp_path / "run"
    result = run_launch(
        [*arguments(corpus, run, 2), "--launcher", "openmpi", "--max-restarts", "2"],
        num_ranks=2,
        timeout_seconds=TIMEOUT_SECONDS,
        env={"PATH": f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"},
        check=False,
        port=free_port(),
    )
    assert result.returncode == 2, result.launcher_output
    assert result.launcher_output.count("DSLLM_WORLD_SIZE: given 2, and Open MPI started 1 ranks") == 1
    assert causes(run) == ["user_error"]
