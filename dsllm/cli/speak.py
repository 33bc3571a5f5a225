"""Commands that let a trained model speak: generate, chat."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dsllm.cli.models import quiet_libraries
from dsllm.cli.options import AsJson
from dsllm.errors import UserError

INTERRUPTED = 130  # as shells have it for a program that Ctrl-C ended

Source = Annotated[
    Path,
    typer.Argument(help="Folder of a run, a checkpoint (global_step<N>, converted or not), or an exported folder."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write at most.")]
COLDEST, HOTTEST = 0.001, 1000.0
"""Between these temperatures quotients of logits stay finite, and tokens differ in probability."""
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopK = Annotated[int, typer.Option(min=0, help="Choose among so many tokens; 0 for all.")]
TopP = Annotated[float, typer.Option(help="Choose among this share of the probability, from 0 to 1.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed writes the same text.")]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to compute; auto is a GPU where there is one.")
]
PrecisionOption = Annotated[
    Literal["bf16", "fp16", "fp32"] | None,
    typer.Option("--precision", help="Type to compute in; fp32 on the CPU and bf16 on a GPU when absent."),
]


def generate(
    source: Source,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; - reads it from stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to go on from.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    samples: Annotated[int, typer.Option(min=1, help="Continuations to write.")] = 1,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 0.95,
    stop: Stop = None,
    seed: Seed = 1337,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    as_json: AsJson = False,
) -> None:
    """Let a trained model continue a prompt; the text appears as it is written.

    Example: dsllm generate runs/quickstart --prompt "def main(" --samples 3
    """
    check_choice(temperature, top_p, stop)
    text = read_prompt(prompt, prompt_file)
    model, tokenizer = ready(source, device, precision)
    from dsllm.model.generate import Sampling, encode_prompt
    from dsllm.model.generate import generate as continuations
    from dsllm.model.text_stream import decode

    context = encode_prompt(tokenizer, text)
    beginning = decode(tokenizer, context)
    write = functools.partial(
        continuations,
        model,
        tokenizer,
        context,
        Sampling(max_new_tokens, temperature, top_k, top_p, tuple(stop or ())),
        seed=seed,
        num_samples=samples,
    )
    with until_closed_or_interrupted():
        if not as_json:
            write(on_text=SamplePrinter(beginning, samples))
            return
        started = time.perf_counter()
        written = write()
        seconds = time.perf_counter() - started
        num_tokens = [one.num_tokens for one in written]
        document = {
            "prompt": text,
            "texts": [beginning + one.text for one in written],
            "tokens": num_tokens,
            "seconds": seconds,
            "tokens_per_second": sum(num_tokens) / seconds,
        }
        typer.echo(json.dumps(document, ensure_ascii=False, indent=2))


def chat(
    source: Source,
    user: Annotated[
        str | None, typer.Option(help='Before your turns in a plain transcript; "User:" when absent.')
    ] = None,
    model: Annotated[
        str | None, typer.Option(help='Before the model\'s turns in a plain transcript; "Model:" when absent.')
    ] = None,
    system: Annotated[str, typer.Option(help="Text that stands before all that is said.")] = "",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 0.95,
    stop: Stop = None,
    seed: Seed = 1337,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
) -> None:
    """Talk to a trained model, which reads all that was said before; /help has the commands of the session.

    A tokenizer's chat template is used where there is one. Without it, and with --user or --model, the conversation is
    a plain transcript, as a model takes it that has only been pre-trained.

    Example: dsllm chat out/quickstart --user "Q:" --model "A:"
    """
    check_choice(temperature, top_p, stop)
    speaker, tokenizer = ready(source, device, precision)
    from dsllm.cli.chat_session import talk
    from dsllm.model.chat import MODEL_LABEL, USER_LABEL, Conversation, Form, Template, Transcript
    from dsllm.model.generate import Sampling

    form: Form
    if tokenizer.chat_template and user is None and model is None:
        form = Template(tokenizer, system)
    else:
        labels = (USER_LABEL if user is None else user, MODEL_LABEL if model is None else model)
        form = Transcript(tokenizer, *labels, system)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, tuple(stop or ()))
    with until_closed_or_interrupted():
        talk(Conversation(speaker, tokenizer, form, sampling, seed))


def check_choice(temperature: float, top_p: float, stops: list[str] | None) -> None:
    """UserError for options of which no choice of tokens can be made, "not a number" among them."""
    if temperature != 0 and not COLDEST <= temperature <= HOTTEST:
        raise UserError(
            f"--temperature: given {temperature:g}; must be 0, or from {COLDEST:g} to {HOTTEST:g}; choose 0 for the "
            "likeliest token each time"
        )
    if not 0 <= top_p <= 1:
        raise UserError(f"--top-p: given {top_p:g}; must be from 0 to 1; choose 1 for all tokens")
    if "" in (stops or ()):
        raise UserError("--stop: given an empty text, before which everything would end; give some text, or no --stop")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text of --prompt, of stdin, or of a file, without the end of its last line. Raises UserError."""
    if file is not None and prompt is not None:
        raise UserError("--prompt-file: given with --prompt; name one of the two")
    if file is None and prompt != "-":
        return prompt or ""
    name = str(file or "--prompt -")
    try:
        content = file.read_bytes() if file else sys.stdin.buffer.read()
        return content.decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise UserError(f"--prompt-file: given {name}, which cannot be read: {error.strerror}; name another") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error


def ready(source: Path, device: Literal["auto", "cpu", "cuda"], precision: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a source, where and in what they are to compute."""
    quiet_libraries()
    from dsllm.checkpoint.export import load_any
    from dsllm.model.placement import place

    model, tokenizer = load_any(source)
    return place(model, device, precision), tokenizer


class SamplePrinter:
    """Prints samples one after the other, though all are written at once: the one whose turn it is as it comes, and
    what the later ones have meanwhile when theirs has come."""

    def __init__(self, beginning: str, num_samples: int) -> None:
        heads = [typer.style(f"--- sample {number}", dim=True) + "\n" for number in range(1, num_samples + 1)]
        self._waiting = [head + beginning for head in heads] if num_samples > 1 else [beginning]
        self._has_ended = [False] * num_samples
        self._turn = 0

    def __call__(self, sample: int, piece: str, is_last: bool) -> None:
        self._waiting[sample] += piece
        self._has_ended[sample] = is_last
        while self._turn < len(self._waiting):
            typer.echo(self._waiting[self._turn], nl=False)
            self._waiting[self._turn] = ""
            if not self._has_ended[self._turn]:
                return
            typer.echo()
            self._turn += 1


@contextmanager
def until_closed_or_interrupted() -> Iterator[None]:
    """Within, a closed pipe ends the command well: its reader has what it wanted. So does Ctrl-C, with a status that
    says so."""
    try:
        yield
    except BrokenPipeError:
        # What is still to be flushed has no reader, which Python would complain about at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None
    except KeyboardInterrupt:
        typer.echo(err=True)
        raise typer.Exit(INTERRUPTED) from None
