"""What the numbers of a step say about the run: it goes on, it goes back to its last checkpoint, or it ends.

Every rank decides from the same numbers (the loss is the mean over all ranks, a fault is known to all), and so alike.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsllm.data.batches import batch_of, samples_of, share_of
from dsllm.engine import ranks
from dsllm.engine.first_loss import check_first_loss, untrained_loss
from dsllm.engine.metrics import recent_losses
from dsllm.engine.nonfinite import Fault
from dsllm.engine.run_folder import RunFolder
from dsllm.engine.spikes import Spike, SpikeDetector
from dsllm.errors import TrainingError
from dsllm.launch.history import History, num_roll_backs, read_history, skipped_batches
from dsllm.plan.batch import BatchPlan
from dsllm.plan.model_shape import ModelShape
from dsllm.spec.sections import Guards, Spec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Past:
    """What a run that goes on knows of the steps before."""

    skipped_batches: tuple[int, ...] = ()
    num_roll_backs: int = 0
    losses: tuple[float, ...] = ()
    """Of the last steps, oldest first; fewer than asked for near the beginning."""


def open_judge(
    spec: Spec,
    shape: ModelShape,
    batch: BatchPlan,
    world: ranks.World,
    folder: RunFolder,
    first_step: int,
    checkpoint: Path | None,
    earlier: Path | None,
) -> Judge:
    """The judge of a run that starts, or goes on from a checkpoint; collective.

    The history in `earlier`, the folder of the checkpoint's run, says which batches are skipped; that of this run notes
    that it begins.
    """
    past = Past()
    if earlier is not None:
        past = ranks.on_rank_0(lambda: read_past(RunFolder(earlier), first_step, spec.guards.spike_window))
    is_untrained = spec.model.init.kind == "scratch"
    judge = Judge(spec.guards, batch, world, folder, past, untrained_loss(shape, spec), is_untrained)
    details = {"checkpoint": str(checkpoint)} if checkpoint else {}
    skipped = list(past.skipped_batches)
    event = "resumed" if checkpoint else "started"
    judge.history.append(event, first_step, **details, world_size=world.size, skipped_batches=skipped)
    return judge


def read_past(folder: RunFolder, step: int, window: int) -> Past:
    """What the run in `folder` says of itself up to `step`, with the losses of `window` steps. On rank 0 only."""
    events = read_history(folder.history)
    return Past(skipped_batches(events), num_roll_backs(events), recent_losses(folder.metrics, step, window))


class Judge:
    """Judges each step by its loss and its fault, and keeps what must be remembered for that."""

    def __init__(
        self,
        guards: Guards,
        batch: BatchPlan,
        world: ranks.World,
        folder: RunFolder,
        past: Past,
        untrained_loss: float,
        is_untrained: bool = True,
    ) -> None:
        """`untrained_loss` is what the first loss must be about; of a trained model, what it must not be far above."""
        self.history = History(folder.history, writes=world.rank == 0)
        self.skipped_batches = past.skipped_batches
        self._guards = guards
        self._batch = batch
        self._world = world
        self._folder = folder
        self._untrained_loss = untrained_loss
        self._is_untrained = is_untrained
        self._num_roll_backs = past.num_roll_backs
        self._num_faults = 0
        self._spikes = self._detector(past.losses)

    @property
    def is_sound(self) -> bool:
        """Whether the last step was finite, so that the weights are worth saving."""
        return self._num_faults == 0

    def goes_back(self, step: int, loss: float, grad_norm: float, fault: Fault | None, can_go_back: bool) -> bool:
        """Say what is wrong with a step that is done, the `step`-th; whether the run is to go back to its last
        checkpoint, which it can where it has one.

        Raises TrainingError where it cannot go on: faults in a row, spoiled weights, an absurd first loss.
        """
        if fault is not None:
            self._report_fault(step, fault)
            return False
        self._num_faults = 0
        if not math.isfinite(grad_norm):
            logger.info("step %d: skipped, and the loss scale lowered: gradients exceed fp16's range at it", step)
            return False
        if step == 1:
            check_first_loss(loss, self._untrained_loss, is_untrained=self._is_untrained)
        spike = self._spikes.observe(loss)
        return spike is not None and self._report_spike(step, spike, can_go_back)

    def rolled_back(self, spike_step: int, step: int) -> None:
        """Go on from `step`, without the samples of the spike at `spike_step`; collective."""
        samples = self._samples_of(spike_step)
        self.skipped_batches = (*self.skipped_batches, batch_of(spike_step - 1, self.skipped_batches))
        self._num_roll_backs += 1
        self._spikes = self._detector(
            ranks.on_rank_0(lambda: recent_losses(self._folder.metrics, step, self._guards.spike_window))
        )
        self.history.append("rolled_back", spike_step, to_step=step, skipped_batches=list(self.skipped_batches))
        logger.warning(
            "rolled back from step %d to %d; samples %s are skipped from here on (%d of %d roll-backs)",
            spike_step,
            step,
            _first_to_last(samples),
            self._num_roll_backs,
            self._guards.max_roll_backs,
        )

    def _detector(self, losses: Sequence[float]) -> SpikeDetector:
        return SpikeDetector(self._guards.spike_window, self._guards.spike_threshold, losses)

    def _report_fault(self, step: int, fault: Fault) -> None:
        samples = self._samples_of(step)
        self._num_faults += fault.outcome != "recovered"
        self.history.append("nonfinite", step, **_details(fault, samples), in_a_row=self._num_faults)
        said = self._sentence(fault, samples)
        if fault.outcome == "spoiled":
            raise TrainingError(
                f"step {step}: {said}; the run stops before it saves spoiled weights; resume with a lower "
                "optimizer.learning_rate or a longer schedule.warmup_steps",
                cause="non_finite",
            )
        logger.warning("step %d: %s", step, said)
        if fault.outcome == "recovered":
            self._num_faults = 0
        elif self._num_faults >= self._guards.nonfinite_limit:
            raise TrainingError(
                f"step {step}: {said}; that makes {self._num_faults} in a row, guards.nonfinite_limit; the run stops, "
                "its earlier checkpoints are untouched; resume with a lower optimizer.learning_rate, a longer "
                "schedule.warmup_steps, or training.precision bf16 instead of fp16",
                cause="non_finite",
            )

    def _sentence(self, fault: Fault, samples: range) -> str:
        if fault.outcome == "recovered":
            return (
                f"a loss or gradient was not finite, and was when it was computed again from the same samples "
                f"({_first_to_last(samples)}): the step counts; look for a faulty device or link"
            )
        causes = [
            f"{cause} is not finite, on samples {_first_to_last(share_of(samples, rank, self._world.size))}"
            for rank, cause in zip(fault.ranks, fault.causes(), strict=True)
        ] or [f"no rank's own gradients, but their sum over the ranks is not finite, on {_first_to_last(samples)}"]
        end = "; skipped, the weights did not change" if fault.outcome == "skipped" else ""
        return "; ".join(causes) + end

    def _report_spike(self, step: int, spike: Spike, can_go_back: bool) -> bool:
        samples = self._samples_of(step)
        self.history.append("spike", step, **vars(spike), samples=_ends(samples))
        decision, goes_back = self._decide(can_go_back)
        logger.warning(
            "step %d: the loss is %.3f, where the median of the last steps is %.3f: %.1f robust deviations, more than "
            "guards.spike_threshold %g, on samples %s%s",
            step,
            spike.loss,
            spike.median,
            spike.score,
            self._guards.spike_threshold,
            _first_to_last(samples),
            decision,
        )
        return goes_back

    def _decide(self, can_go_back: bool) -> tuple[str, bool]:
        if self._guards.on_spike == "warn":
            return "", False
        if self._num_roll_backs >= self._guards.max_roll_backs:
            return f"; the run goes on: it went back {self._num_roll_backs} times, guards.max_roll_backs", False
        if not can_go_back:
            return "; the run goes on: there is no checkpoint yet to go back to", False
        return "; going back to the last checkpoint", True

    def _samples_of(self, step: int) -> range:
        return samples_of(batch_of(step - 1, self.skipped_batches), self._batch.global_batch_size)


def _details(fault: Fault, samples: range) -> dict[str, Any]:
    gradients = {str(rank): name for rank, name in fault.gradients.items()}
    return {"outcome": fault.outcome, "losses": fault.losses, "gradients": gradients, "samples": _ends(samples)}


def _ends(samples: range) -> list[int]:
    """The first and the last."""
    return [samples[0], samples[-1]]


def _first_to_last(samples: range) -> str:
    return f"{samples[0]} to {samples[-1]}"
