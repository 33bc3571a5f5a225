"""A conversation: what was said is what the model reads, whole turns fall out, and it needs no terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsllm.errors import UserError
from dsllm.model.chat import Conversation, Template, Transcript, Turn
from dsllm.model.generate import Sampling
from dsllm.model.text_stream import decode
from tests.speaking_models import write_model

POSITIONS = 128
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant]"
TURNS = [Turn("user", "the fox"), Turn("assistant", "jumps over"), Turn("user", "what?")]


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = write_model(tmp_path_factory.mktemp("chat") / "model", positions=POSITIONS)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tokenizer(speaker: tuple[Any, Any]) -> Any:
    return speaker[1]


def converse(speaker: tuple[Any, Any], **sampling: Any) -> Conversation:
    return Conversation(*speaker, Transcript(speaker[1]), Sampling(**{"max_new_tokens": 12, **sampling}), seed=1)


def ask(conversation: Conversation, text: str) -> str:
    conversation.say(text)
    return conversation.answer(lambda piece: None)


def test_a_transcript_has_a_line_a_turn_and_ends_where_the_model_is_to_go_on(tokenizer: Any) -> None:
    plain = decode(tokenizer, Transcript(tokenizer).context(TURNS))
    assert plain == "User: the fox\nModel: jumps over\nUser: what?\nModel:"
    own = Transcript(tokenizer, "Q:", "A:", "A dialogue.")
    assert decode(tokenizer, own.context(TURNS)) == "A dialogue.\nQ: the fox\nA: jumps over\nQ: what?\nA:"
    assert own.stops == ("\nQ:", "\nA:")


def test_a_chat_template_is_applied_as_transformers_does(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    text = decode(tokenizer, Template(tokenizer, "Be brief.").context(TURNS))
    assert text == "[system] Be brief.\n[user] the fox\n[assistant] jumps over\n[user] what?\n[assistant]"


def test_a_template_that_refuses_the_conversation_is_a_mistake_in_one_line(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match=r"refuses the conversation \(System role not supported\); leave --system out"):
        Template(tokenizer, "Be brief.").context(TURNS)


def test_an_answer_is_what_was_heard_without_the_space_behind_the_label(speaker: tuple[Any, Any]) -> None:
    conversation = converse(speaker, temperature=1.2)
    heard: list[str] = []
    conversation.say("the fox")
    answer = conversation.answer(heard.append)
    assert answer == "".join(heard).rstrip()
    assert answer == answer.strip() != ""
    assert conversation.turns == [Turn("user", "the fox"), Turn("assistant", answer)]


def test_what_was_said_before_is_read_again(speaker: tuple[Any, Any]) -> None:
    conversation, other = converse(speaker), converse(speaker)
    first = ask(conversation, "the fox")
    second = ask(conversation, "what?")
    other.turns = [Turn("user", "the fox"), Turn("assistant", first)]
    assert ask(other, "what?") != second  # another answer's luck
    other.turns = other.turns[:2]
    other._num_answers = 1
    assert ask(other, "what?") == second
    conversation.reset()
    assert conversation.turns == []


def test_an_answer_ends_where_the_next_turn_begins_and_at_texts_of_ones_own(speaker: tuple[Any, Any]) -> None:
    whole = ask(converse(speaker), "the fox")
    stop = whole[3:5]
    expected = whole[: whole.index(stop)].rstrip()
    assert ask(converse(speaker, stops=(stop,)), "the fox") == expected
    form = Transcript(speaker[1])
    form.stops = (stop,)  # an untrained model never comes to a label
    assert ask(Conversation(*speaker, form, Sampling(max_new_tokens=12), seed=1), "the fox") == expected


def test_the_oldest_turns_fall_out_whole_when_the_context_is_full(speaker: tuple[Any, Any]) -> None:
    conversation = converse(speaker)
    turns = [Turn(role, f"{number} the quick brown fox") for number in range(4) for role in ("user", "assistant")]
    conversation.turns = turns
    dropped = conversation.say("what?")
    assert dropped > 0
    assert dropped % 2 == 0
    assert conversation.turns == [*turns[dropped:], Turn("user", "what?")]
    context = Transcript(speaker[1])
    assert len(context.context(conversation.turns)) + 12 <= POSITIONS
    assert len(context.context([*turns[dropped - 2 :], Turn("user", "what?")])) + 12 > POSITIONS
    assert conversation.answer(lambda piece: None) is not None


def test_what_leaves_no_room_for_an_answer_is_refused_and_was_not_said(speaker: tuple[Any, Any]) -> None:
    conversation = converse(speaker, max_new_tokens=1000)
    ask(conversation, "the fox")
    before = list(conversation.turns)
    with pytest.raises(
        UserError, match=r"the model has 128 positions, of which an answer needs 32; say less at a time"
    ):
        conversation.say("the fox " * 60)
    assert conversation.turns == before


def test_an_interrupted_answer_keeps_what_was_written_and_the_conversation_goes_on(speaker: tuple[Any, Any]) -> None:
    conversation = converse(speaker)
    heard: list[str] = []

    def interrupt(piece: str) -> None:
        heard.append(piece)
        if len("".join(heard)) > 5:
            raise KeyboardInterrupt

    conversation.say("the fox")
    with pytest.raises(KeyboardInterrupt):
        conversation.answer(interrupt)
    assert conversation.turns[-1] == Turn("assistant", "".join(heard).rstrip())
    assert ask(conversation, "go on") == conversation.turns[-1].text
    assert len(conversation.turns) == 4


def test_a_transcript_to_keep_has_all_turns(speaker: tuple[Any, Any]) -> None:
    conversation = converse(speaker)
    conversation.turns = TURNS[:2]
    assert conversation.transcript() == "user: the fox\nassistant: jumps over\n"


def test_a_model_without_positions_forgets_nothing(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", family="bloom")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    conversation = converse((model, AutoTokenizer.from_pretrained(folder)))
    conversation.turns = [Turn(role, "the quick brown fox " * 10) for role in ("user", "assistant")] * 4
    assert conversation.say("what?") == 0
