"""What ends a run: a request from outside, or a first loss that no untrained model has."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dsllm.engine import guards
from dsllm.engine.guards import StopRequest, check_first_loss, untrained_loss
from dsllm.errors import TrainingError
from dsllm.model.build import build_model, model_config
from dsllm.model.initialize import initialize_weights
from dsllm.plan.model_shape import model_shape
from dsllm.spec.load import load_spec, preset_names

ROOT = Path(__file__).parents[1]

WAITS_FOR_SIGNALS = """
import logging, sys, time
import torch
from dsllm.engine.guards import StopRequest

logging.basicConfig(stream=sys.stdout, format="%(message)s")
stop = StopRequest()
try:
    print("ready", float(stop.as_tensor(torch.device("cpu"))), flush=True)
    while sys.stdin.readline() != "end\\n":
        print(stop.signal and stop.signal.name, float(stop.as_tensor(torch.device("cpu"))), flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_a_first_loss_that_no_untrained_model_has_stops_the_run_with_both_numbers() -> None:
    with pytest.raises(TrainingError, match=r"^step 1: the loss is 87\.00, where an untrained model has 6\.90 "):
        check_first_loss(87.0, 6.9)
    with pytest.raises(TrainingError, match=r"the loss is 1\.20, where an untrained model has 6\.90"):
        check_first_loss(1.2, 6.9)


def test_a_sound_first_loss_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", guards.__name__)
    check_first_loss(7.1, 6.9)
    assert caplog.messages == ["first loss 7.100; a model that has learned nothing has 6.900"]


def test_an_error_of_training_exits_with_1() -> None:
    assert TrainingError.exit_code == 1


@pytest.mark.parametrize("overrides", [[], ["model.initializer_range=0.1"], ["model.tie_word_embeddings=false"]])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_first_loss_of_a_fresh_model_is_the_one_foretold(family: str, overrides: list[str]) -> None:
    shape = "num_layers: 2, hidden_size: 128, num_attention_heads: 4"
    spec = load_spec("quickstart", [f"model={{family: {family}, {shape}}}", *overrides])
    model = build_model(model_config(spec), torch.float32)
    initialize_weights(model, spec.seed)
    ids = torch.randint(4096, (2, 129), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(untrained_loss(model_shape(spec), spec), abs=0.3)


@pytest.mark.parametrize("preset", preset_names())
def test_what_is_foretold_for_a_preset_is_about_ln_of_its_vocabulary(preset: str) -> None:
    spec = load_spec(preset)
    expected = float(torch.tensor(float(spec.vocab_size)).log())
    assert untrained_loss(model_shape(spec), spec) == pytest.approx(expected, abs=1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_the_end_after_the_step_and_says_so_once(number: signal.Signals) -> None:
    with waiting_process() as process:
        assert answer(process) == "ready 0.0"
        process.send_signal(number)
        assert answer(process) == f"{number.name}: finishing this step, then saving; Ctrl-C again ends at once"
        assert ask(process) == f"{number.name} 1.0"
        process.send_signal(signal.SIGTERM)  # what the launcher sends after a Ctrl-C
        assert ask(process) == f"{number.name} 1.0"
        assert process.communicate("end\n", timeout=30)[0] == ""
        assert process.returncode == 0


def test_a_second_ctrl_c_ends_at_once() -> None:
    with waiting_process() as process:
        answer(process)
        process.send_signal(signal.SIGINT)
        assert answer(process).startswith("SIGINT: finishing this step")
        process.send_signal(signal.SIGINT)
        assert answer(process) == "interrupted"


def test_a_request_knows_of_no_agreement_before_a_step_ends() -> None:
    with own_handlers():
        stop = StopRequest()
        assert stop.signal is None
        assert stop.agreed is False


@contextmanager
def waiting_process() -> Iterator[subprocess.Popen[str]]:
    """A process with a StopRequest that answers each line with the state of its request."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS_FOR_SIGNALS], stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answer(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().rstrip("\n")


def ask(process: subprocess.Popen[str]) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return answer(process)


@contextmanager
def own_handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
