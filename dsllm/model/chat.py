"""A conversation with a model: what was said, as the context of what it says next. Needs no terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsllm.errors import UserError, one_line
from dsllm.model.generate import Sampling, generate
from dsllm.model.positions import num_positions

Role = Literal["user", "assistant"]

USER_LABEL, MODEL_LABEL = "User:", "Model:"
ROOM_SHARE = 4
"""An answer finds room for its tokens at most, and for a quarter of the positions where those are more."""


class Turn(NamedTuple):
    """What one of the two said at a time."""

    role: Role
    text: str


class Form(Protocol):
    """How turns become what a model reads."""

    stops: tuple[str, ...]
    """Texts with which a turn of the model's ends."""

    def context(self, turns: Sequence[Turn]) -> list[int]:
        """The ids of the turns, up to where the model is to answer."""
        ...


class Transcript:
    """Lines with labels, for models that know no chat template: what a base model takes for a dialogue in a book."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        user_label: str = USER_LABEL,
        model_label: str = MODEL_LABEL,
        opening: str = "",
    ) -> None:
        """`opening` is text that always stands at the beginning."""
        self._tokenizer = tokenizer
        self._labels: dict[Role, str] = {"user": user_label, "assistant": model_label}
        self._opening = f"{opening}\n" if opening else ""
        self.stops = tuple(f"\n{label}" for label in self._labels.values())

    def context(self, turns: Sequence[Turn]) -> list[int]:
        lines = "".join(f"{self._labels[turn.role]} {turn.text}\n" for turn in turns)
        text = f"{self._opening}{lines}{self._labels['assistant']}"
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids


class Template:
    """The tokenizer's own chat template."""

    stops: tuple[str, ...] = ()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, opening: str = "") -> None:
        """`opening` is the system's message."""
        self._tokenizer = tokenizer
        self._opening = [{"role": "system", "content": opening}] if opening else []

    def context(self, turns: Sequence[Turn]) -> list[int]:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                [*self._opening, *messages], add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # templates raise what they like
            raise UserError(
                f"the tokenizer's chat template refuses the conversation ({one_line(error)}); "
                "leave --system out, or give --user and --model for a plain transcript"
            ) from error
        return ids


class Conversation:
    """What was said so far, and what says the next turn."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: Form, sampling: Sampling, seed: int
    ) -> None:
        self.turns: list[Turn] = []
        self._model = model
        self._tokenizer = tokenizer
        self._form = form
        self._sampling = sampling._replace(stops=(*form.stops, *sampling.stops))
        self._seed = seed
        self._num_answers = 0
        self._positions = num_positions(model.config)

    def say(self, text: str) -> int:
        """The user's turn. Returns how many of the oldest turns fell out of the context to make room.

        Raises UserError where the text alone leaves the model no room; then nothing was said.
        """
        turns = [*self.turns, Turn("user", text)]
        while not self._fits(turns):
            if len(turns) == 1:
                raise UserError(
                    f"given {len(self._form.context(turns))} tokens to answer; the model has {self._positions} "
                    f"positions, of which an answer needs {self._room_for_an_answer()}; say less at a time"
                )
            turns = turns[2:]  # what was said, and its answer
        num_dropped = len(self.turns) + 1 - len(turns)
        self.turns = turns
        return num_dropped

    def answer(self, on_text: Callable[[str], None]) -> str:
        """The model's turn, which `on_text` hears as it is written.

        KeyboardInterrupt ends it early: what was written until then is the turn, and the interrupt is raised on.
        """
        piece_by_piece = _WithoutLeadingSpace(on_text)
        seed = self._seed + self._num_answers  # else each answer would begin with the same luck
        self._num_answers += 1
        try:
            generate(
                self._model,
                self._tokenizer,
                self._form.context(self.turns),
                self._sampling,
                seed=seed,
                on_text=lambda sample, piece, is_last: piece_by_piece(piece),
            )
        finally:
            self.turns.append(Turn("assistant", piece_by_piece.text.rstrip()))
        return self.turns[-1].text

    def reset(self) -> None:
        """Forget all that was said."""
        self.turns = []

    def transcript(self) -> str:
        """What was said and is still in the context, a paragraph a turn."""
        return "".join(f"{turn.role}: {turn.text}\n" for turn in self.turns)

    def _fits(self, turns: Sequence[Turn]) -> bool:
        if self._positions is None:
            return True
        return len(self._form.context(turns)) + self._room_for_an_answer() <= self._positions

    def _room_for_an_answer(self) -> int:
        assert self._positions is not None
        return max(1, min(self._sampling.max_new_tokens, self._positions // ROOM_SHARE))


class _WithoutLeadingSpace:
    """Hands pieces on from the first character that is not white space: behind a label stands a space."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self.text = ""
        self._on_text = on_text

    def __call__(self, piece: str) -> None:
        if not self.text:
            piece = piece.lstrip()
        self.text += piece
        self._on_text(piece)
