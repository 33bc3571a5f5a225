"""A spec as commands read it, and the sizes of its network, from wherever they are to be had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsllm.plan.workload import Workload
    from dsllm.spec.sections import Spec


def read_spec(spec: str, overrides: Sequence[str] | None = None) -> Spec:
    """The spec, with the configuration of its network where that is on the Hub.

    Raises UserError where it cannot be had.
    """
    from importlib.util import find_spec

    from dsllm.spec.load import load_spec

    loaded = load_spec(spec, overrides or ())
    if loaded.model.family != "auto" or isinstance(loaded.model.config, dict) or find_spec("transformers") is None:
        return loaded
    from dsllm.model.configs import with_written_config

    return with_written_config(loaded)


def counted(parameters: int, active_parameters: int) -> str:
    """`46.7B parameters, 12.9B of them active`; the second only where experts are passed over."""
    from dsllm.units import format_count

    text = f"{format_count(parameters)} parameters"
    return text + (f", {format_count(active_parameters)} of them active" if active_parameters < parameters else "")


def workload_of(spec: Spec) -> Workload:
    """The spec's workload; a network that no formula knows is built for it, without memory."""
    from dsllm.model.shapes import shape_of
    from dsllm.plan.workload import workload

    return workload(spec, shape=shape_of(spec))
