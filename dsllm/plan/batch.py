"""The batch on a number of ranks, solved exactly, so that the same spec is the same optimisation on any of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsllm.errors import UserError

if TYPE_CHECKING:
    from dsllm.spec.sections import Batch


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of an optimizer step are dealt out: micro x accumulation x ranks = global, exactly."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    sequence_length: int
    world_size: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step, over all ranks."""
        return self.global_batch_size * self.sequence_length


def resolve_batch(batch: Batch, world_size: int, micro_batch_size: int | None = None) -> BatchPlan:
    """The batch on `world_size` ranks; `micro_batch_size` is the choice made for a spec that says `auto`.

    Raises UserError where the global batch leaves a remainder, with the sizes nearby that do not.
    """
    micro = micro_batch_size if batch.micro_batch_size == "auto" else batch.micro_batch_size
    if micro is None:
        raise UserError(
            "batch.micro_batch_size: given auto where no device's memory is known; "
            "give a number, for example --set batch.micro_batch_size=1"
        )
    if batch.global_batch_size % (micro * world_size):
        raise UserError(_remainder(batch.global_batch_size, micro, world_size))
    return BatchPlan(
        micro_batch_size=micro,
        gradient_accumulation_steps=batch.global_batch_size // (micro * world_size),
        global_batch_size=batch.global_batch_size,
        sequence_length=batch.sequence_length,
        world_size=world_size,
    )


def check_batch(batch: Batch, world_size: int) -> None:
    """Raises UserError where the batch leaves a remainder on so many ranks."""
    if batch.micro_batch_size == "auto":
        micro_batch_choices(batch.global_batch_size, world_size)
    else:
        resolve_batch(batch, world_size)


def micro_batch_choices(global_batch_size: int, world_size: int) -> list[int]:
    """Every micro-batch size that divides the batch of a rank, in ascending order.

    Raises UserError where the global batch does not divide over the ranks at all.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest:
        raise UserError(_remainder(global_batch_size, 1, world_size))
    return _divisors(share)


def _remainder(global_batch_size: int, micro_batch_size: int, world_size: int) -> str:
    together = micro_batch_size * world_size
    below = global_batch_size // together * together
    nearest = [str(size) for size in (below, below + together) if size]
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    message = (
        f"batch.global_batch_size: given {global_batch_size}; micro_batch_size {micro_batch_size} on {ranks} takes "
        f"{together} sequences at a time, which must divide it; try global_batch_size {' or '.join(nearest)}"
    )
    if global_batch_size % world_size:
        counts = [
            ranks for ranks in _divisors(global_batch_size) if global_batch_size % (ranks * micro_batch_size) == 0
        ]
        return f"{message}, or {_nearest_two(counts, world_size)} ranks" if counts else message
    return (
        f"{message}, or micro_batch_size {_nearest_two(_divisors(global_batch_size // world_size), micro_batch_size)}"
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nearest_two(candidates: list[int], wanted: int) -> str:
    """`4 or 8`, the two candidates nearest to 7."""
    nearest = sorted(candidates, key=lambda candidate: abs(candidate - wanted))[:2]
    return " or ".join(str(candidate) for candidate in sorted(nearest))
