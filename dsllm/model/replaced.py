"""A function of another library's module that is another one for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within, `module.name` is `function`."""
    given = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, given)
