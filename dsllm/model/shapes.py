"""The sizes of any spec's network: by formula, or by building the model without memory where no formula has them."""

from __future__ import annotations

from importlib.util import find_spec

from dsllm.plan.model_shape import ModelShape, has_formula, model_shape
from dsllm.spec.derived import written_config
from dsllm.spec.sections import Spec


def shape_of(spec: Spec) -> ModelShape:
    """Raises UserError where the network must be built for it and torch is not installed, and where its configuration
    has yet to be read."""
    is_to_read = spec.model.family == "auto" and not written_config(spec.model)
    if has_formula(spec) or is_to_read or find_spec("torch") is None:
        return model_shape(spec)
    from dsllm.model.build import model_config
    from dsllm.model.trace import traced_shape

    return traced_shape(model_config(spec), spec.vocab_size)
