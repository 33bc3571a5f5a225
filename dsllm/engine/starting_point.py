"""An existing model that a run starts from: rank 0 reads it, one weight at a time, and the others get what it read."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from torch.nn import Parameter
from transformers import PreTrainedModel

from dsllm.data.tokenizer import load_tokenizer
from dsllm.engine import ranks
from dsllm.engine.activity import Activity
from dsllm.engine.gates.weights import Moments, moments_of
from dsllm.model.carry_over import CarryOver, open_carry_over
from dsllm.model.gather import gathered
from dsllm.model.source import Source
from dsllm.model.source_tokenizer import refuse_another_tokenizer
from dsllm.spec.sections import Pretrained, Spec

logger = logging.getLogger(__name__)

FROM_SCRATCH = {"kind": "scratch"}
"""What the passport says of a run that starts with random weights."""


class StartingPoint:
    """The model of `model.init`, found to fit the spec. Every rank has one; the files are open on rank 0 alone."""

    def __init__(self, spec: Spec, init: Pretrained, activity: Activity) -> None:
        """Collective. Raises UserError, on every rank, for a model that cannot be had, or is another network."""
        self._init = init
        self._activity = activity
        self._carry_over: CarryOver | None = None
        self._tokens: dict[int, str] | None = None
        self.moments: dict[str, Moments] = {}
        """Of every weight, as it was read, once it has been."""
        self.facts: dict[str, Any] = ranks.on_rank_0(lambda: self._open(spec))
        """What the passport says of it."""

    def check_tokenizer(self, folder: Path) -> None:
        """Collective. Raises UserError where the tokenizer in `folder` gives other numbers to the model's tokens."""
        ranks.on_rank_0(lambda: self._compare_tokenizer(folder))

    def set_weights(self, causal_lm: PreTrainedModel) -> None:
        """Set every parameter in place, each a tick; collective. Of those that are not partitioned only rank 0's are
        set, which DeepSpeed sends to the others when its engine starts."""
        ranks.on_rank_0(self._tell)
        with ranks.together():
            faults = [self._set(name, parameter) for name, parameter in causal_lm.named_parameters()]
            if fault := next(filter(None, faults), None):  # only now: the other ranks gather to the last parameter
                raise fault
        self.moments = ranks.on_rank_0(lambda: self.moments)

    def _set(self, name: str, parameter: Parameter) -> Exception | None:
        """The fault, where there was one; collective where the parameter is partitioned."""
        self._activity("starting")
        with gathered(parameter, writer=0):
            if self._carry_over is None:
                return None
            try:
                self._carry_over.fill(name, parameter)
                self.moments[name] = moments_of(parameter)
            except Exception as error:
                return error
        return None

    def _open(self, spec: Spec) -> dict[str, Any]:
        self._carry_over, self._tokens = open_carry_over(spec, self._init)
        return _facts(self._carry_over.source, self._init)

    def _compare_tokenizer(self, folder: Path) -> None:
        assert self._carry_over is not None, "rank 0 has opened it"
        tokens = {number: token for token, number in load_tokenizer(folder).get_vocab().items()}
        if self._tokens is None:
            logger.warning("%s has no tokenizer: whether its tokens are the run's is not checked", self._init.name)
        else:
            refuse_another_tokenizer(tokens, self._tokens, self._init.name)
        self._carry_over.set_num_tokens(1 + max(tokens))

    def _tell(self) -> None:
        assert self._carry_over is not None, "rank 0 has opened it"
        source, num_new = self._carry_over.source, sum(map(len, self._carry_over.rows.new))
        depth = source.config.num_hidden_layers
        taken = f"layers {self._init.layers} of its {depth}" if self._init.layers else f"all {depth} layers"
        new = f"; {num_new} new rows of the vocabulary are the mean of the others" if num_new else ""
        logger.info("starting from %s: %s%s", self._init.name, taken, new)
        if unused := source.conversion.unused:
            logger.warning("%s: %d tensors are no part of it, first %s", self._init.name, len(unused), unused[0])


def open_starting_point(spec: Spec, activity: Activity) -> StartingPoint | None:
    """That of a fresh run; None where weights are drawn at random. Collective."""
    init = spec.model.init
    return StartingPoint(spec, init, activity) if isinstance(init, Pretrained) else None


def facts_of(start: StartingPoint | None) -> dict[str, Any]:
    """What the passport says of it, or of random weights."""
    return start.facts if start is not None else FROM_SCRATCH


def _facts(source: Source, init: Pretrained) -> dict[str, Any]:
    """Enough to tell one model from another without reading all of it."""
    return {
        **init.model_dump(mode="json"),
        "is_folder": Path(init.name).expanduser().is_dir(),
        "config_sha256": hashlib.sha256((source.folder / "config.json").read_bytes()).hexdigest(),
        "weight_files": {file.name: file.stat().st_size for file in source.files},
    }
