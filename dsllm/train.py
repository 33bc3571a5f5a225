"""The program that DeepSpeed's launcher starts on every rank: read it and you know how dsllm trains.

deepspeed --num_gpus 2 dsllm/train.py --spec quickstart
"""

from __future__ import annotations

import sys
from pathlib import Path

# The launcher runs this file by its path, which puts its folder first on sys.path: there our `data` and `model` would
# hide any library of those names. The folder above lets a plain checkout run without being installed.
_PACKAGE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _PACKAGE]
sys.path.append(str(_PACKAGE.parent))

import argparse  # noqa: E402
import faulthandler  # noqa: E402
import functools  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

# Of the standard library alone, all of them: the environment file may say where the others are found.
from dsllm.engine import last_words, rank_output  # noqa: E402
from dsllm.engine.time_limit import TimeLimit, slurm_job_end  # noqa: E402
from dsllm.errors import DsllmError, OneRankError  # noqa: E402
from dsllm.launch import environment  # noqa: E402
from dsllm.launch.expectations import check_world  # noqa: E402
from dsllm.launch.placement import ALONE, Place, place_in, take_place  # noqa: E402
from dsllm.units import format_count, parse_duration  # noqa: E402

if TYPE_CHECKING:
    from dsllm.engine.activity import Activity
    from dsllm.engine.ranks import World
    from dsllm.engine.run_folder import RunFolder
    from dsllm.spec.sections import Spec

EXIT_SECONDS = 20.0
"""What the interpreter of a failed rank may take to end: libraries wait there for threads and for the other ranks."""

logger = logging.getLogger("dsllm.train")
logger.addHandler(logging.NullHandler())  # until the run has a folder for its logs


def main() -> int:
    """Train as the command line says. Returns the exit status: 0 done, 2 the user's mistake, 1 a fault."""
    started = time.time()
    arguments = _parse_arguments()
    rank = place = None  # as long as they are not known
    logs = Path(arguments.run_dir, "logs") if arguments.run_dir is not None else None
    try:
        if arguments.environment_file is not None:
            environment.adopt(arguments.environment_file)
        place = place_in(os.environ) or ALONE
        rank = place.rank
        check_world(place, os.environ)
        take_place(os.environ, place)
        from dsllm.spec.load import load_spec

        spec = load_spec(arguments.spec, arguments.set)
        run_dir = Path(arguments.run_dir or f"runs/{spec.name}")
        logs = run_dir / "logs"
        rank_output.begin(logs, rank)
        if arguments.check:
            check_start(spec, run_dir)
        else:
            stop_after = None if arguments.stop_after is None else parse_duration(arguments.stop_after, "--stop-after")
            limit = TimeLimit(started, stop_after, slurm_job_end(os.environ))
            run_training(spec, run_dir, arguments.resume, limit, arguments.environment_file)
    except DsllmError as error:
        logger.error("%s", error, exc_info=_wants_tracebacks(), extra={"on_screen": False})
        last_words.write_error(logs, rank, error)
        if place is None or _speaks_for_others(place) or isinstance(error, OneRankError):
            print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:
        logger.exception("this rank failed", extra={"on_screen": False})
        last_words.write_error(logs, rank, error)
        more = f" (more in {rank_output.log_file(logs, rank)})" if logs is not None else ""
        print(f"rank {rank}: {type(error).__name__}: {error}{more}", file=sys.stderr)
        return 1
    return 0


def run_training(spec: Spec, run_dir: Path, resume: str, limit: TimeLimit, environment_file: str | None = None) -> None:
    """One run, on every rank: they meet, and from then on none waits for one that hangs or has died."""
    from dsllm.engine import ranks, watchdog
    from dsllm.engine.run_folder import RunFolder, log_to
    from dsllm.model.configs import with_written_config

    world = ranks.join(watchdog.patience_seconds(spec.guards.hang_seconds))
    if environment_file is not None:
        environment.discard(environment_file)  # every rank has it by now
    folder = RunFolder(run_dir)
    log_to(folder.logs, world.rank)
    with watchdog.watch(world, folder.logs, spec.guards.hang_seconds) as activity:
        spec = ranks.on_rank_0(lambda: with_written_config(spec, folder.spec))
        carry_out(spec, world, folder, resume, limit, activity)


def carry_out(spec: Spec, world: World, folder: RunFolder, resume: str, limit: TimeLimit, activity: Activity) -> None:
    """A run from its spec to its last checkpoint, on every rank: all that the loop needs is made here."""
    import torch

    from dsllm.checkpoint.layout import run_folder_of
    from dsllm.checkpoint.resume import (
        candidates,
        check_same_data,
        check_same_run,
        conversion,
        load_checkpoint,
        started_from,
    )
    from dsllm.checkpoint.retention import foretell_room
    from dsllm.checkpoint.save import CheckpointSaver
    from dsllm.checkpoint.verify import first_sound
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import exhausted, inputs, memory_report, metrics, ranks, requests, schedule
    from dsllm.engine.allocators import allocator
    from dsllm.engine.gates.check import conclude
    from dsllm.engine.gates.training import check_small_model
    from dsllm.engine.gates.weights import check_weights
    from dsllm.engine.judge import open_judge
    from dsllm.engine.memory_meter import MemoryMeter
    from dsllm.engine.questions import open_questions, read_material
    from dsllm.engine.run_folder import describe_run, make_passport
    from dsllm.engine.start import loss_implementation, start_engine
    from dsllm.engine.starting_point import facts_of, open_starting_point
    from dsllm.engine.trainer import train
    from dsllm.launch.devices import calibration_file
    from dsllm.model.shapes import shape_of
    from dsllm.plan.batch import resolve_batch
    from dsllm.plan.calibration import read_constants
    from dsllm.plan.cost import checkpoint_bytes
    from dsllm.plan.memory import MemoryEstimate, estimate_memory
    from dsllm.plan.search import choose_micro_batch
    from dsllm.plan.way import Way
    from dsllm.plan.workload import workload
    from dsllm.spec.derived import train_steps

    # Where the run stands.
    asked = requests.Requests()
    checkpoint = first_sound(ranks.on_rank_0(lambda: candidates(resume, folder.checkpoints)))
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
        ranks.on_rank_0(lambda: check_same_run(spec, checkpoint))
    start = open_starting_point(spec, activity) if checkpoint is None else None  # a run that goes on needs none

    # What is to be done, on what.
    shape = shape_of(spec)
    if shape.num_experts:
        logger.info("%s parameters, %s of them active", *map(format_count, (shape.parameters, shape.active_parameters)))
    run, device = workload(spec, loss_implementation(spec), shape), ranks.device_type()
    constants = ranks.on_rank_0(lambda: read_constants(calibration_file()).get(ranks.device_name()))
    beside_tensors = (constants.runtime_bytes, constants.reserved_ratio or 1.0) if constants else ()
    micro_batch_size = choose_micro_batch(run, world.size, ranks.memory_bytes(world), device, *beside_tensors)

    def predict(way: Way) -> MemoryEstimate:
        return estimate_memory(way.run, way.world_size, way.micro_batch_size, device=device)

    needs = exhausted.Needs(Way(run, world.size, micro_batch_size), predict, world)
    batch = resolve_batch(spec.batch, world.size, micro_batch_size)
    steps = train_steps(spec.training, batch.tokens_per_step)
    ds_config = build_ds_config(spec, world.size, device, micro_batch_size, shape)
    activity("preparing tokens")
    data = inputs.ready_data(spec, folder)
    activity("starting")
    material = read_material(spec, folder.tokenizer)
    if start is not None:
        start.check_tokenizer(folder.tokenizer)
    init = started_from(checkpoint) if checkpoint is not None else facts_of(start)
    passport = ranks.on_rank_0(lambda: make_passport(spec, world.size, ranks.device_name(), data, init))
    if checkpoint is not None:
        ranks.on_rank_0(lambda: check_same_data(checkpoint, passport))

    # Model, state and data, at the same step; of a fresh run both its settings and its weights are checked.
    is_checked = checkpoint is None and spec.guards.step_0_checks
    checks = check_small_model(spec, world, asked, activity) if is_checked else []
    memory = MemoryMeter(allocator(device))
    with exhausted.explained(needs, memory, "at the start of the engine"):
        engine = start_engine(spec, ds_config, start)
    if is_checked:
        conclude([check_weights(engine.module.causal_lm, start), *checks], folder.checks)
    torch.manual_seed(spec.seed + world.rank)  # for dropout: weights and data have generators of their own
    first_step = 0
    if checkpoint is not None:
        if (change := ranks.on_rank_0(lambda: conversion(engine, checkpoint))) is not None:
            logger.info("%s", change)
        first_step = load_checkpoint(engine, checkpoint)
    with ranks.together():
        read_training = inputs.open_training(data, spec, batch, world)
        questions = open_questions(spec, data, folder, batch, world, engine, material, activity)
    ranks.on_rank_0(lambda: describe_run(folder, spec, ds_config, passport))
    ranks.on_rank_0(lambda: foretell_room(folder.checkpoints, checkpoint_bytes(run), spec.checkpoint.keep_last))

    earlier = run_folder_of(checkpoint) if checkpoint is not None else None
    judge = open_judge(spec, shape, batch, world, folder, first_step, checkpoint, earlier)
    saver = CheckpointSaver(engine, folder.checkpoints, spec.checkpoint, spec.training.precision, limit.save_took)
    with (
        saver,
        metrics.open_recorder(spec, shape, folder, batch, world, first_step, steps, memory) as record,
        exhausted.explained(needs, memory, "between the phases of a step"),
    ):

        def roll_back() -> int:
            activity("starting")
            saver.finish()
            own = ranks.on_rank_0(lambda: candidates("auto", folder.checkpoints)) if saver.has_saved else []
            last = first_sound(own) or checkpoint
            step = load_checkpoint(engine, last)
            record.go_back(step)
            return step

        # From here on: what came before is no part of a step. All agree on the clock of rank 0.
        asked.limit = limit if world.rank == 0 else None
        done = train(
            engine,
            lambda step: read_training(step, judge.skipped_batches),
            first_step=first_step,
            train_steps=steps,
            questions=questions,
            checkpoint_interval=spec.checkpoint.interval,
            learning_rate=functools.partial(
                schedule.learning_rate,
                schedule=spec.schedule,
                peak=spec.optimizer.learning_rate,
                train_steps=steps,
            ),
            saver=saver,
            record=record,
            judge=judge,
            roll_back=roll_back,
            requests=asked,
            memory=memory,
            activity=activity,
        )
    memory_report.conclude(folder.memory, predict(needs.way), engine, memory.measured, steps=done - first_step)
    if done < steps:
        judge.history.append("stopped", done, by=asked.reason)
        how = "the same command" if resume == "auto" else "the same command without --resume"
        logger.info("stopped by %s after step %d of %d; saved: %s goes on from there", asked.reason, done, steps, how)
    else:
        judge.history.append("finished", done)
        logger.info("trained to step %d of %d; the run is in %s", done, steps, folder.path)


def check_start(spec: Spec, run_dir: Path) -> None:
    """What `dsllm check` starts on every rank: the checks before a run's first step, without its tokens."""
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import ranks
    from dsllm.engine.activity import Activity
    from dsllm.engine.gates.check import conclude
    from dsllm.engine.gates.training import check_small_model
    from dsllm.engine.gates.weights import check_weights
    from dsllm.engine.requests import Requests
    from dsllm.engine.run_folder import RunFolder, log_to
    from dsllm.engine.start import start_engine
    from dsllm.engine.starting_point import open_starting_point
    from dsllm.model.configs import with_written_config
    from dsllm.model.shapes import shape_of

    world = ranks.join()
    folder = RunFolder(run_dir)
    log_to(folder.logs, world.rank)
    spec = ranks.on_rank_0(lambda: with_written_config(spec))
    # nothing is read by it: where the spec leaves the micro-batch open, one that always divides will do
    ds_config = build_ds_config(spec, world.size, ranks.device_type(), micro_batch_size=1, shape=shape_of(spec))
    activity = Activity()
    start = open_starting_point(spec, activity)
    checks = check_small_model(spec, world, Requests(), activity)
    engine = start_engine(spec, ds_config, start)
    conclude([check_weights(engine.module.causal_lm, start), *checks], folder.checks)


def _speaks_for_others(place: Place) -> bool:
    """What stops a run is known to all ranks, and rank 0 says it; before they have met, it may be the mistake of one
    host alone, and the first rank of each says it."""
    distributed = sys.modules.get("torch.distributed")
    have_met = distributed is not None and distributed.is_initialized()
    return place.rank == 0 or (place.local_rank == 0 and not have_met)


def _wants_tracebacks() -> bool:
    """Whether `dsllm --debug` or the environment asks for them, in the logs."""
    return bool(os.environ.get("DSLLM_DEBUG"))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train on this rank; DeepSpeed's launcher starts one for each GPU.",
        epilog="example: deepspeed --num_gpus 2 dsllm/train.py --spec quickstart --set training.train_steps=50",
    )
    parser.add_argument("--spec", required=True, help="spec file, or the name of a preset")
    parser.add_argument("--run-dir", help="folder of the run; runs/<name> when absent")
    parser.add_argument("--resume", default="auto", help="auto (from the latest checkpoint), never, or a path")
    parser.add_argument("--stop-after", metavar="TIME", help="save and end after so long, as 90s, 45m, 3h50m or 1d2h")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a field")
    parser.add_argument("--check", action="store_true", help="make the checks before the first step, and stop")
    parser.add_argument(
        "--environment-file", metavar="FILE", help="variables to start with, as dsllm launch writes them; yours alone"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    return parser.parse_args()


if __name__ == "__main__":
    status = main()
    if status != 0:
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=sys.__stderr__)
    sys.exit(status)
