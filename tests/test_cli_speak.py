"""`dsllm generate` and `dsllm chat`: what they print and where, on terminals and pipes, and how they end."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers.utils.logging import disable_progress_bar

from dsllm.cli.app import main
from dsllm.cli.speak import SamplePrinter
from tests.speaking_models import write_model

ROOT = Path(__file__).parent.parent
DSLLM = [sys.executable, "-m", "dsllm.cli.app"]
ENDLESS_TOKENS = 100_000
"""More than an untrained model of such positions writes in a minute."""


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSLLM_DEBUG", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TERM", "dumb")
    disable_progress_bar()  # as a fresh process has it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("speak") / "model")


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes until it is stopped."""
    folder = write_model(tmp_path_factory.mktemp("speak") / "talkative", positions=ENDLESS_TOKENS + 100)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "eos_token": None, "bos_token": None}))
    return folder


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object, stdin: bytes = b""
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["dsllm", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


# --- generate ---------------------------------------------------------------------------------------------------------


def test_what_is_printed_is_what_json_has(capsys, monkeypatch, model: Path) -> None:
    flags = ["generate", model, "--prompt", "größe ", "--samples", 3, "--max-new-tokens", 20]
    status, printed, _ = run(capsys, monkeypatch, *flags)
    assert status == 0
    status, document, _ = run(capsys, monkeypatch, *flags, "--json")
    written = json.loads(document)
    assert status == 0
    assert set(written) == {"prompt", "texts", "tokens", "seconds", "tokens_per_second"}
    assert printed == "".join(f"--- sample {number}\n{text}\n" for number, text in enumerate(written["texts"], 1))
    assert all(text.startswith("größe ") for text in written["texts"])
    assert max(written["tokens"]) <= 20
    assert written["tokens_per_second"] == pytest.approx(sum(written["tokens"]) / written["seconds"])


def test_one_sample_has_no_heading(capsys, monkeypatch, model: Path) -> None:
    _, printed, _ = run(capsys, monkeypatch, "generate", model, "--prompt", "def", "--temperature", 0)
    assert printed.startswith("def")


def test_a_prompt_comes_from_stdin_or_a_file_too(capsys, monkeypatch, model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("def main(\n\n", encoding="utf-8")
    shared = ["generate", model, "--json", "--max-new-tokens", 4]
    _, from_stdin, _ = run(capsys, monkeypatch, *shared, "--prompt", "-", stdin="höhe\n".encode())
    _, from_file, _ = run(capsys, monkeypatch, *shared, "--prompt-file", tmp_path / "prompt")
    assert json.loads(from_stdin)["prompt"] == "höhe"
    assert json.loads(from_file)["prompt"] == "def main(\n"


def test_a_stop_text_ends_a_sample(capsys, monkeypatch, model: Path) -> None:
    flags = ["generate", model, "--prompt", "def", "--json", "--seed", 3]
    whole = json.loads(run(capsys, monkeypatch, *flags)[1])["texts"][0]
    stop = whole[10:12]
    stopped = json.loads(run(capsys, monkeypatch, *flags, "--stop", stop, "--stop", "never said")[1])["texts"][0]
    assert stopped == whole[: whole.index(stop, 3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a", "--prompt-file", "b"], "--prompt-file: given with --prompt; name one of the two"),
        (["--prompt-file", "none"], "--prompt-file: given none, which cannot be read: No such file or directory"),
        (["--prompt", "-"], "--prompt -: not UTF-8 text at byte 1; save it as UTF-8"),
        (["--device", "cuda"], "--device: given cuda, and torch finds no GPU here; choose cpu, or auto"),
        (["--samples", "2", "--temperature", "0"], "--samples: given 2 at --temperature 0, where all are the same"),
        (["--temperature", "1e-42"], "--temperature: given 1e-42; must be 0, or from 0.001 to 1000; choose 0 for"),
        (["--temperature", "inf"], "--temperature: given inf; must be 0, or from 0.001 to 1000"),
        (["--temperature", "nan"], "--temperature: given nan; must be 0, or from 0.001 to 1000"),
        (["--temperature", "-1"], "--temperature: given -1; must be 0, or from 0.001 to 1000"),
        (["--top-p", "nan"], "--top-p: given nan; must be from 0 to 1; choose 1 for all tokens"),
        (["--top-p", "1.5"], "--top-p: given 1.5; must be from 0 to 1"),
        (["--stop", "x", "--stop", ""], "--stop: given an empty text, before which everything would end; give some"),
        (["--prompt", "x" * 80], "--prompt: given 80 tokens; the model has 64 positions; shorten it"),
    ],
)
def test_a_mistake_is_one_line(capsys, monkeypatch, model: Path, flags: list[str], message: str) -> None:
    status, out, err = run(capsys, monkeypatch, "generate", model, *flags, stdin=b"a\xff")
    assert (status, out) == (2, "")
    assert err.startswith(f"dsllm: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--temperature", "0.001"], ["--temperature", "1000"], ["--seed", str(2**63 - 1)]])
def test_the_outermost_choices_are_taken(capsys, monkeypatch, model: Path, flags: list[str]) -> None:
    status, out, err = run(capsys, monkeypatch, "generate", model, "--prompt", "def", "--max-new-tokens", 4, *flags)
    assert (status, err) == (0, "")
    assert out.startswith("def")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_seed_that_torch_does_not_take_is_a_mistake(capsys, monkeypatch, model: Path, command: str) -> None:
    for seed in (-1, 2**63):
        status, out, err = run(capsys, monkeypatch, command, model, "--seed", seed)
        assert (status, out) == (2, "")
        assert "Invalid value for '--seed'" in err


def test_a_folder_that_is_not_there_is_a_mistake(capsys, monkeypatch, tmp_path: Path) -> None:
    for command in ("generate", "chat"):
        status, _, err = run(capsys, monkeypatch, command, tmp_path / "gone")
        assert status == 2
        assert err.startswith(f"dsllm: {tmp_path}/gone: no such folder; give a run, one of its checkpoints, or an exp")


def test_a_folder_that_holds_no_model_is_a_mistake(capsys, monkeypatch, tmp_path: Path) -> None:
    status, _, err = run(capsys, monkeypatch, "generate", tmp_path)
    assert status == 2
    assert err.startswith(f"dsllm: {tmp_path}: no checkpoint there; give a run")


def test_samples_are_printed_in_turn_though_they_are_written_at_once(capsys) -> None:
    printer = SamplePrinter("def", 3)
    printer(0, " a", False)
    printer(1, " x", False)
    printer(2, " last", True)
    assert capsys.readouterr().out == "--- sample 1\ndef a"
    printer(0, "b", True)
    assert capsys.readouterr().out == "b\n--- sample 2\ndef x"
    printer(1, "y", True)
    assert capsys.readouterr().out == "y\n--- sample 3\ndef last\n"


def test_a_reader_that_has_enough_ends_the_command_well(talkative: Path) -> None:
    command = [*DSLLM, "generate", str(talkative), "--prompt", "a\nb", "--max-new-tokens", str(ENDLESS_TOKENS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"a\n"
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""


def test_text_is_there_before_all_of_it_is_written_and_ctrl_c_ends_it(talkative: Path) -> None:
    command = [*DSLLM, "generate", str(talkative), "--prompt", "def", "--max-new-tokens", str(ENDLESS_TOKENS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(20).startswith(b"def")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors.strip() == b""


# --- chat -------------------------------------------------------------------------------------------------------------


def test_lines_on_a_pipe_are_answered_and_nothing_else_is_printed(capsys, monkeypatch, model: Path) -> None:
    flags = ["chat", model, "--max-new-tokens", 8, "--seed", 5]
    status, once, err = run(capsys, monkeypatch, *flags, stdin=b"the fox\n")
    assert (status, err) == (0, "")
    said = "the fox\n\n/reset\n  höhe\n/quit\nnever read\n".encode()
    status, out, err = run(capsys, monkeypatch, *flags, stdin=said)
    assert (status, err) == (0, "forgotten\n")
    assert out.startswith(once)
    assert len(out) > len(once)


def test_labels_and_a_beginning_of_ones_own_change_what_is_read(capsys, monkeypatch, model: Path) -> None:
    flags = ["chat", model, "--max-new-tokens", 8]
    answers = {
        run(capsys, monkeypatch, *flags, *more, stdin=b"the fox\n")[1]
        for more in ([], ["--user", "Q:"], ["--model", "A:"], ["--system", "def"], ["--user", ""], ["--model", ""])
    }
    assert len(answers) == 6


def test_a_session_is_saved_where_no_file_is_yet(capsys, monkeypatch, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.txt"
    flags = ["chat", model, "--max-new-tokens", 8]
    status, out, err = run(capsys, monkeypatch, *flags, stdin=f"the fox\n/save {file}\n".encode())
    assert (status, err) == (0, f"2 turns in {file}\n")
    assert file.read_text() == f"user: the fox\nassistant: {out.rstrip()}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sing", "/sing: no such command; /help shows those there are"),
        ("/save", "/save: given no file; name a new one, as in /save chat.txt"),
        ("/save {there}", "/save: given {there}, which is there already; name a new one, as in /save chat.txt"),
        ("/save {there}/x", "/save: given {there}/x, which cannot be written: Not a directory; name another"),
        ("x" * 80, "given 91 tokens to answer; the model has 64 positions, of which an answer needs 16"),
    ],
)
def test_on_a_pipe_a_mistake_ends_the_session(
    capsys, monkeypatch, model: Path, tmp_path: Path, line: str, message: str
) -> None:
    there = tmp_path / "there"
    there.write_text("")
    line, message = line.replace("{there}", str(there)), message.replace("{there}", str(there))
    status, out, err = run(capsys, monkeypatch, "chat", model, stdin=f"{line}\nthe fox\n".encode())
    assert (status, out) == (2, "")
    assert err.startswith(f"dsllm: {message}")


def test_help_names_the_commands(capsys, monkeypatch, model: Path) -> None:
    _, out, err = run(capsys, monkeypatch, "chat", model, stdin=b"/help\n")
    assert out == ""
    assert all(command in err for command in ("/reset", "/save FILE", "/help", "/quit", "Ctrl-C"))


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.seen = ""
        self._terminal, other = pty.openpty()
        self.process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True)
        os.close(other)

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Until `text` is shown, behind what was waited for last."""
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < until, self.seen
            self._read()
        self.seen = self.seen.partition(text)[2]

    def interrupt_until(self, text: str, seconds: float = 60.0) -> None:
        """Ctrl-C until `text` is shown: one that comes between a prompt and readline's wait for a key is not heard."""
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < until, self.seen
            self.process.send_signal(signal.SIGINT)
            for _ in range(10):
                self._read()
        self.seen = self.seen.partition(text)[2]

    def wait_for_more(self, seconds: float = 60.0) -> None:
        """Until anything is shown behind what was waited for last."""
        until = time.monotonic() + seconds
        while not self.seen.strip():
            assert time.monotonic() < until
            self._read()

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def _read(self) -> None:
        if select.select([self._terminal], [], [], 0.2)[0]:
            self.seen += os.read(self._terminal, 4096).decode("utf-8", errors="replace")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_the_session(talkative: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.txt"
    terminal = Terminal([*DSLLM, "chat", str(talkative), "--max-new-tokens", str(ENDLESS_TOKENS // 5)])
    try:
        terminal.wait_for("> ")
        terminal.type("/sing\n")
        terminal.wait_for("/sing: no such command")
        terminal.wait_for("> ")
        terminal.interrupt_until("> ")  # at the prompt: the line alone
        terminal.type("the fox\n")
        terminal.wait_for("the fox")
        terminal.wait_for_more()
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("> ")
        terminal.type(f"/save {file}\n")
        terminal.wait_for("2 turns in")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.end()
    assert file.read_text().startswith("user: the fox\nassistant: ")
