"""Saving as a transaction: a checkpoint counts once every rank has written it and read it back, and not before."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch.distributed as distributed
from deepspeed import DeepSpeedEngine

from dsllm.checkpoint.layout import (
    fragments_file,
    random_state_file,
    read_latest,
    remove,
    step_folder,
    write_latest,
)
from dsllm.checkpoint.manifest import FileRecord, Manifest, write_manifest
from dsllm.checkpoint.restore import loss_scaler_numbers
from dsllm.checkpoint.retention import remove_old
from dsllm.checkpoint.snapshot import HostBuffers, Snapshot, offloaded_files, write_files
from dsllm.checkpoint.states import RankStates
from dsllm.engine import ranks
from dsllm.engine.fragments import layout_of, shapes_of
from dsllm.engine.generators import generator_states
from dsllm.engine.last_words import cause_of
from dsllm.errors import Cause, CheckpointError, OneRankError, TrainingError, first_line
from dsllm.spec.sections import Checkpoint, Precision
from dsllm.units import format_bytes

logger = logging.getLogger(__name__)

SPARE_BYTES = 2**18
"""Room on the disk for each rank beyond its tensors: the names in its files, and its small files."""

Files = dict[str, FileRecord]


class _Fault(NamedTuple):
    """Why a checkpoint could not be written."""

    cause: Cause
    reason: str


@dataclass
class _Pending:
    """A checkpoint that does not count yet."""

    folder: Path
    step: int
    copied: Future[None]
    """Whether this rank's state is in host memory."""
    files: Future[Files]
    """Of this rank, as it has written them."""
    manifest: Future[_Fault | None] | None = None
    """Once all ranks have written: what went wrong on rank 0, which completes it."""
    begun: float = field(default_factory=time.monotonic)


class CheckpointSaver:
    """Writes the checkpoints of a run beside its training. `save`, `poll` and `finish` are collective.

    A block ended by a TrainingError, which all ranks raise together, still finishes what is being written.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        checkpoints: Path,
        settings: Checkpoint,
        precision: Precision,
        took: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """`took` is told of each checkpoint how many seconds passed until it counted."""
        self._engine = engine
        self._checkpoints = checkpoints
        self._settings = settings
        self._precision = precision
        self._took = took
        self._buffers = HostBuffers()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self.has_saved = False
        """Whether a checkpoint of this run counts: the same on every rank."""

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint has begun that does not count yet: the same on every rank."""
        return self._pending is not None

    def save(self, step: int, *, must_succeed: bool = False) -> None:
        """Begin to write the state after `step` steps, once an earlier checkpoint is finished.

        It is copied to host memory beside the next forward and backward, so `settle` must come before the next update.
        Training waits for the disk where `checkpoint.asynchronous` is false or the save `must_succeed`. What cannot be
        written is a warning, and CheckpointError where it must succeed or the spec says so; earlier checkpoints and
        `latest` are untouched then.
        """
        self.finish()
        folder = step_folder(self._checkpoints, step)
        fault = ranks.on_rank_0(lambda: _make_folder(folder))
        if fault is None:
            snapshot = self._take(folder)
            fault = _lack_of_memory(snapshot) or self._lack_of_room()
        if fault is not None:
            self._give_up(folder, fault, must_succeed)
            return
        copied = self._writer.submit(snapshot.copy)
        self._pending = _Pending(folder, step, copied, self._writer.submit(_write, folder, copied, snapshot.files))
        if must_succeed or not self._settings.asynchronous:
            self.finish(must_succeed=must_succeed)

    def settle(self) -> None:
        """Wait until this rank's state may change, because it is in host memory. Not collective: where that fails, all
        ranks hear of it together with what cannot be written."""
        if self._pending is not None:
            wait([self._pending.copied])

    def poll(self) -> None:
        """Between two steps: let the checkpoint that is being written come as far as it can without waiting."""
        if self._pending is not None and not ranks.any_rank(_is_busy(self._pending)):
            self._advance(self._pending, must_succeed=False)

    def finish(self, *, must_succeed: bool = False) -> None:
        """Wait until the checkpoint that is being written counts, if there is one."""
        while self._pending is not None:
            self._advance(self._pending, must_succeed)

    def _advance(self, pending: _Pending, must_succeed: bool) -> None:
        """Once every rank has written its files, rank 0 completes the checkpoint; once it has, the checkpoint counts.

        Waits for the former or the latter.
        """
        if pending.manifest is None:
            outcomes = ranks.gather(_outcome(pending.files))
            faults = _with_ranks(fault for _, fault in outcomes)
            if not faults:
                files = {name: record for of_rank, _ in outcomes for name, record in of_rank.items()}
                pending.manifest = self._begin_to_complete(pending, files)
                return
            fault: _Fault | None = faults[0]
        else:
            fault = ranks.on_rank_0(pending.manifest.result)
        self._pending = None
        if fault is not None:
            self._give_up(pending.folder, fault, must_succeed)
        else:
            self._took(time.monotonic() - pending.begun)
            self.has_saved = True
            logger.info("saved %s", pending.folder)

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_known_to_all = kind is not None and issubclass(kind, TrainingError) and not issubclass(kind, OneRankError)
        if is_known_to_all:
            try:
                self.finish()
            except CheckpointError as error:  # what ended the block is what matters
                logger.warning("%s", error)
        # The others must hear at once of what one rank raised alone.
        is_in_order = kind is None or is_known_to_all
        self._writer.shutdown(wait=is_in_order, cancel_futures=not is_in_order)

    def _take(self, folder: Path) -> Snapshot:
        """This rank's files as they are now."""
        snapshot = Snapshot(self._buffers)
        with _deepspeed_writes_to(snapshot, self._engine):
            self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        rank = distributed.get_rank()
        snapshot.save(generator_states(), str(random_state_file(folder, rank)))
        if states := self._rank_states(snapshot, folder):
            snapshot.files[fragments_file(folder, rank)] = states.model_dump_json()
        return snapshot

    def _rank_states(self, snapshot: Snapshot, folder: Path) -> RankStates | None:
        """How to read the optimizer's states in what DeepSpeed writes; None on ranks that write none (stage 0)."""
        layout = layout_of(self._engine)
        ending = "_model_states.pt" if self._engine.zero_optimization_stage() == 0 else "_optim_states.pt"
        names = [path.name for path in snapshot.files if path.name.endswith(ending)]
        if not names:
            return None
        return RankStates.model_construct(
            file=names[0],
            nesting=layout.nesting,
            shapes=shapes_of(self._engine),
            loss_scaler=loss_scaler_numbers(self._engine),
            fragments=layout.fragments,
        )

    def _lack_of_room(self) -> _Fault | None:
        """What the disk lacks for the checkpoint that is in host memory now, on all ranks together."""
        size_bytes = sum(ranks.gather(self._buffers.size_bytes)) + SPARE_BYTES * distributed.get_world_size()
        free_bytes = ranks.on_rank_0(lambda: shutil.disk_usage(self._checkpoints).free)
        if free_bytes >= size_bytes:
            return None
        reason = f"it takes {format_bytes(size_bytes)}, and {self._checkpoints} has {format_bytes(free_bytes)} free"
        return _Fault("disk", reason)

    def _begin_to_complete(self, pending: _Pending, files: Files) -> Future[_Fault | None]:
        if distributed.get_rank() != 0:
            return self._writer.submit(lambda: None)
        manifest = Manifest(
            step=pending.step,
            precision=self._precision,
            zero_stage=self._engine.zero_optimization_stage(),
            world_size=distributed.get_world_size(),
            files=files,
            follows=latest.name if (latest := read_latest(self._checkpoints)) else None,
        )
        return self._writer.submit(_complete, pending.folder, manifest, self._settings)

    def _give_up(self, folder: Path, fault: _Fault, must_succeed: bool) -> None:
        if distributed.get_rank() == 0:
            with contextlib.suppress(OSError):  # of a disk that has become read-only
                remove(folder)
        if must_succeed or self._settings.on_failure == "stop":
            raise CheckpointError(
                f"{folder.name} was not saved: {fault.reason}; earlier checkpoints are untouched; make room or choose "
                "another --run-dir, then start again: the run goes on from the last one",
                cause=fault.cause,
            )
        logger.warning(
            "%s was not saved: %s; earlier checkpoints are untouched; the run goes on, and tries again at the next one",
            folder.name,
            fault.reason,
        )


@contextlib.contextmanager
def _deepspeed_writes_to(snapshot: Snapshot, engine: DeepSpeedEngine) -> Iterator[None]:
    """DeepSpeed saves into `snapshot`, and without its recovery scripts, whose copy could raise on rank 0 alone."""
    usual_writer = engine.checkpoint_engine
    engine.checkpoint_engine = snapshot
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = usual_writer
        del engine._copy_recovery_script


def _make_folder(folder: Path) -> _Fault | None:
    """An empty one, in the place of what an earlier save may have left. Returns what went wrong."""
    try:
        remove(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        return _not_written(error, folder)
    return None


def _not_written(error: OSError, path: Path) -> _Fault:
    """By rank 0, at `path` where the system does not say which."""
    return _Fault(cause_of(error), f"rank 0: {error.filename or path} could not be written: {error.strerror}")


def _with_ranks(faults: Iterable[_Fault | None]) -> list[_Fault]:
    """Those that there are, of each rank in order, and whose they are."""
    return [
        fault._replace(reason=f"rank {rank}: {fault.reason}") for rank, fault in enumerate(faults) if fault is not None
    ]


def _lack_of_memory(snapshot: Snapshot) -> _Fault | None:
    """What keeps a rank from having its state in host memory too; collective."""
    return next(iter(_with_ranks(ranks.gather(_fault_of(snapshot.allocate)))), None)


def _fault_of(work: Callable[[], None]) -> _Fault | None:
    try:
        work()
    except (MemoryError, RuntimeError) as error:
        return _Fault("out_of_memory", f"no host memory: {first_line(error)}")
    return None


def _write(folder: Path, copied: Future[None], files: Mapping[Path, object]) -> Files:
    """On the writing thread, where the copy has come before: this rank's files, by their names in the checkpoint."""
    copied.result()
    records = write_files(files) | offloaded_files(folder, distributed.get_rank())
    return {path.relative_to(folder).as_posix(): record for path, record in records.items()}


def _complete(folder: Path, manifest: Manifest, settings: Checkpoint) -> _Fault | None:
    """On rank 0's writing thread: from here on the checkpoint counts, and what it replaces may go.

    Returns what went wrong.
    """
    try:
        write_manifest(folder, manifest)
        write_latest(folder.parent, folder)
    except OSError as error:
        return _not_written(error, folder)
    try:
        remove_old(folder.parent, folder, settings.keep_last, settings.keep_every)
    except OSError as error:
        logger.warning("%s: an old checkpoint stays: %s", error.filename or folder.parent, error.strerror)
    return None


def _is_busy(pending: _Pending) -> bool:
    """Whether this rank still works at it."""
    return not (pending.manifest or pending.files).done()


def _outcome(files: Future[Files]) -> tuple[Files, _Fault | None]:
    """What a rank has written, and what stopped it."""
    try:
        return files.result(), None
    except Exception as error:
        return {}, _Fault(cause_of(error), first_line(error))
