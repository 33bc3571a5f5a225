"""What a model writes: streamed it is the same text, it ends where it should, and mistakes are one line."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, MptConfig

from dsllm.errors import DsllmError, UserError
from dsllm.model.generate import Sampling, encode_prompt, generate
from dsllm.model.placement import place
from dsllm.model.positions import num_positions
from dsllm.model.text_stream import decode
from tests.speaking_models import VOCAB_SIZE, write_model

PROMPTS = ["", "def main(", "größe", "日本", "🦊 ", "e\u0301", "  \n"]
POSITIONS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def speaker(request: pytest.FixtureRequest, folder: Path) -> tuple[Any, Any]:
    return load(write_model(folder / request.param, vocabulary=request.param, positions=POSITIONS))


@pytest.fixture(scope="module")
def unlimited(folder: Path) -> tuple[Any, Any]:
    """BLOOM, whose configuration names no positions."""
    return load(write_model(folder / "bloom", family="bloom"))


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def write(speaker: tuple[Any, Any], prompt: str, sampling: Sampling, **more: Any) -> list[Any]:
    return generate(*speaker, encode_prompt(speaker[1], prompt), sampling, seed=7, **more)


def write_streamed(
    speaker: tuple[Any, Any], prompt: str, sampling: Sampling, num_samples: int
) -> tuple[list[Any], dict[int, str], dict[int, list[bool]]]:
    """The continuations, and for each sample what was heard and which pieces were said to be the last."""
    heard: dict[int, str] = defaultdict(str)
    ends: dict[int, list[bool]] = defaultdict(list)

    def on_text(sample: int, piece: str, is_last: bool) -> None:
        heard[sample] += piece
        ends[sample].append(is_last)

    return write(speaker, prompt, sampling, num_samples=num_samples, on_text=on_text), heard, ends


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_stream_joined_is_the_text_of_all_tokens(speaker: tuple[Any, Any], prompt: str, temperature: float) -> None:
    num_samples = 1 if temperature == 0 else 4
    sampling = Sampling(max_new_tokens=32, temperature=temperature, top_k=0, top_p=1.0)
    written, heard, ends = write_streamed(speaker, prompt, sampling, num_samples)
    assert [one.text for one in written] == [heard[sample] for sample in range(num_samples)]
    for sample in range(num_samples):
        assert ends[sample].count(True) == 1
        assert ends[sample][-1]


def likeliest(speaker: tuple[Any, Any], context: list[int], num_tokens: int) -> list[int]:
    """So many tokens, or up to the end of the text, by a whole forward for each."""
    model, tokenizer = speaker
    ids = list(context)
    while len(ids) < len(context) + num_tokens:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1, :VOCAB_SIZE].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            return ids[len(context) : -1]
    return ids[len(context) :]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_likeliest_tokens_are_written_at_temperature_0(speaker: tuple[Any, Any], prompt: str) -> None:
    _, tokenizer = speaker
    prompt += " ("  # no byte, which the next could make invalid
    context = encode_prompt(tokenizer, prompt)
    (written,) = write(speaker, prompt, Sampling(max_new_tokens=24, temperature=0.0))
    expected = likeliest(speaker, context, 24)
    assert decode(tokenizer, context) + written.text == decode(tokenizer, context + expected)
    assert written.num_tokens == len(expected)


def test_rows_that_pad_the_vocabulary_are_never_written(speaker: tuple[Any, Any]) -> None:
    model, tokenizer = speaker
    context = encode_prompt(tokenizer, "def main(")
    expected = likeliest(speaker, context, 8)
    rows = model.get_output_embeddings().weight
    before = rows.detach().clone()
    try:
        with torch.no_grad():
            rows[VOCAB_SIZE:] = 100 * rows[expected[0]]  # now likelier than any token
            assert int(model(torch.tensor([context])).logits[0, -1].argmax()) >= VOCAB_SIZE
        (written,) = generate(model, tokenizer, context, Sampling(max_new_tokens=8, temperature=0.0), seed=1)
    finally:
        with torch.no_grad():
            rows.copy_(before)
    assert decode(tokenizer, context) + written.text == decode(tokenizer, context + expected)


def test_the_same_seed_writes_the_same_text_and_another_seed_another(speaker: tuple[Any, Any]) -> None:
    context = encode_prompt(speaker[1], "def")
    texts = [generate(*speaker, context, Sampling(max_new_tokens=16), seed=seed)[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_text_ends_before_a_stop_text(speaker: tuple[Any, Any]) -> None:
    sampling = Sampling(max_new_tokens=24, temperature=0.0)
    (whole,) = write(speaker, "def main(", sampling)
    stop = whole.text[4:7]
    (stopped,) = write(speaker, "def main(", sampling._replace(stops=("no such text", stop)))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.num_tokens < whole.num_tokens


def test_samples_end_each_by_itself(speaker: tuple[Any, Any]) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=1.0, top_k=0, top_p=1.0, stops=(" ", "e", "\n"))
    written, heard, _ = write_streamed(speaker, "def", sampling, 8)
    assert len({one.num_tokens for one in written}) > 1
    assert not any(stop in text for text in heard.values() for stop in sampling.stops)


def test_a_text_ends_at_the_tokens_that_end_texts_which_are_not_counted(
    speaker: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = speaker
    context = encode_prompt(tokenizer, "def main(")
    expected = likeliest(speaker, context, 16)
    end = next(token for token in expected if token != expected[0])
    # as the folder of a chat model names tokens of its own
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, end])
    (written,) = write(speaker, "def main(", Sampling(max_new_tokens=16, temperature=0.0))
    before_it = expected[: expected.index(end)]
    assert written.num_tokens == len(before_it)
    assert decode(tokenizer, context) + written.text == decode(tokenizer, context + before_it)


@pytest.mark.parametrize(
    "own", [{"num_beams": 4}, {"repetition_penalty": 5.0, "max_length": 7, "min_new_tokens": 2, "min_p": 0.9}]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_how_a_model_would_choose_by_itself_changes_nothing(
    speaker: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, own: dict[str, Any], temperature: float
) -> None:
    sampling = Sampling(max_new_tokens=16, temperature=temperature)
    expected = write(speaker, "def main(", sampling)
    settings = GenerationConfig(**own)
    monkeypatch.setattr(speaker[0], "generation_config", settings)
    assert write(speaker, "def main(", sampling) == expected
    assert speaker[0].generation_config is settings


def test_a_text_ends_where_the_positions_do(speaker: tuple[Any, Any]) -> None:
    sampling = Sampling(max_new_tokens=1000, temperature=1.0, top_k=0, top_p=1.0)
    context = [5] * 40
    written = generate(*speaker, context, sampling, seed=3, num_samples=4)
    assert max(one.num_tokens for one in written) == POSITIONS - 40


def test_a_model_without_positions_in_its_configuration_writes_as_long_as_asked(unlimited: tuple[Any, Any]) -> None:
    assert num_positions(unlimited[0].config) is None
    assert num_positions(MptConfig(max_seq_len=77)) == 77
    assert num_positions(GPT2Config(n_positions=77)) == 77
    written = generate(*unlimited, [5] * 80, Sampling(max_new_tokens=20), seed=3, num_samples=4)
    assert max(one.num_tokens for one in written) == 20


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_a_prompt_without_room_behind_it_is_refused(speaker: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"--prompt: given 64 tokens; the model has 64 positions; shorten it"):
        generate(*speaker, [5] * 64, Sampling(), seed=1)


def test_several_samples_of_the_likeliest_tokens_are_refused(speaker: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"--samples: given 3 at --temperature 0, where all are the same; ask for 1"):
        generate(*speaker, [5], Sampling(temperature=0.0), seed=1, num_samples=3)


def test_an_empty_prompt_needs_an_end_of_text_token_to_begin_with(speaker: tuple[Any, Any]) -> None:
    _, tokenizer = speaker
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_token_id]
    before, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        with pytest.raises(UserError, match=r"--prompt: given none, and the tokenizer has no end-of-text token"):
            encode_prompt(tokenizer, "")
    finally:
        tokenizer.eos_token = before


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
def test_weights_that_were_spoiled_are_told(folder: Path, spoiled: float) -> None:
    model, tokenizer = load(write_model(folder / "spoiled"))
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(spoiled)
    with pytest.raises(
        DsllmError, match=r"logits are not finite: its weights were spoiled; take an earlier checkpoint"
    ):
        generate(model, tokenizer, [5], Sampling(), seed=1)


# --- device and precision ---------------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there_is_refused(speaker: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device: given cuda, and torch finds no GPU here; choose cpu, or auto"):
        place(speaker[0], "cuda", None)


def test_precision_is_that_of_the_weights_and_not_of_rotary_frequencies(folder: Path) -> None:
    model, tokenizer = load(write_model(folder / "llama", family="llama"))
    assert place(model, "cpu", None).dtype == torch.float32
    frequencies = model.model.rotary_emb.inv_freq.clone()
    assert place(model, "cpu", "bf16").dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert generate(model, tokenizer, [5], Sampling(max_new_tokens=4), seed=1)[0].num_tokens <= 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_is_the_gpu_in_bf16(folder: Path) -> None:
    model, tokenizer = load(write_model(folder / "cuda", family="llama"))
    assert place(model, "auto", None).device.type == "cuda"
    assert generate(model, tokenizer, [5], Sampling(max_new_tokens=4), seed=1)[0].num_tokens <= 4
