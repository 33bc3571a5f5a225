"""Parameters as a whole, whether ZeRO-3 has partitioned them or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def gathered(parameter: torch.nn.Parameter, writer: int | None = None) -> Iterator[bool]:
    """Within, `parameter` is whole on every rank; collective where it is partitioned.

    What rank `writer` makes of it is kept on all ranks; without a writer it is only read. Yields whether this rank is
    to write: of a parameter that is whole on every rank, each of them writes its own.
    """
    if not hasattr(parameter, "ds_id"):
        yield writer is not None
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=writer):
        yield torch.distributed.get_rank() == writer
