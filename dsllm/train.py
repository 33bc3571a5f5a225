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
import contextlib  # noqa: E402
import functools  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402

from dsllm.errors import DsllmError, OneRankError  # noqa: E402
from dsllm.spec.load import load_spec  # noqa: E402
from dsllm.spec.sections import Spec  # noqa: E402

logger = logging.getLogger("dsllm.train")
logger.addHandler(logging.NullHandler())  # until the run has a folder for its logs


def main() -> int:
    """Train as the command line says. Returns the exit status: 0 done, 2 the user's mistake, 1 a fault."""
    arguments = _parse_arguments()
    rank = int(os.environ.get("RANK", 0))
    try:
        spec = load_spec(arguments.spec, arguments.set)
        run_dir = Path(arguments.run_dir or f"runs/{spec.name}")
        run_training(spec, run_dir, arguments.resume)
    except DsllmError as error:
        logger.error("%s", error, exc_info=_wants_tracebacks(), extra={"on_screen": False})
        if rank == 0 or isinstance(error, OneRankError):  # what else stops a run is known to all ranks
            print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:
        logger.exception("this rank failed", extra={"on_screen": False})
        print(f"rank {rank}: {type(error).__name__}: {error} (more in {run_dir}/logs/rank{rank}.log)", file=sys.stderr)
        return 1
    return 0


def run_training(spec: Spec, run_dir: Path, resume: str) -> None:
    """One run, from its spec to its last checkpoint, on every rank: all that the loop needs is made here."""
    import torch

    from dsllm.checkpoint.resume import candidates, check_same_data, check_same_run, conversion, load_checkpoint
    from dsllm.checkpoint.save import CheckpointSaver
    from dsllm.checkpoint.verify import first_sound
    from dsllm.data.shards import read_manifest
    from dsllm.ds_config import build_ds_config
    from dsllm.engine import evaluation, exhausted, guards, inputs, memory_report, metrics, ranks, schedule
    from dsllm.engine.allocators import allocator
    from dsllm.engine.memory_meter import MemoryMeter
    from dsllm.engine.run_folder import RunFolder, describe_run, log_to, make_passport
    from dsllm.engine.start import loss_implementation, start_engine
    from dsllm.engine.trainer import train
    from dsllm.engine.watch import open_watch
    from dsllm.launch.devices import calibration_file
    from dsllm.plan.batch import resolve_batch
    from dsllm.plan.calibration import read_constants
    from dsllm.plan.memory import MemoryEstimate, estimate_memory
    from dsllm.plan.search import choose_micro_batch
    from dsllm.plan.way import Way
    from dsllm.plan.workload import workload
    from dsllm.spec.derived import train_steps

    # Who is here, and where the run stands.
    world = ranks.join()
    folder = RunFolder(run_dir)
    log_to(folder.logs, world.rank)
    stop = guards.StopRequest()
    checkpoint = first_sound(ranks.on_rank_0(lambda: candidates(resume, folder.checkpoints)))
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
        ranks.on_rank_0(lambda: check_same_run(spec, checkpoint))

    # What is to be done, on what.
    run, device = workload(spec, loss_implementation(spec)), ranks.device_type()
    constants = ranks.on_rank_0(lambda: read_constants(calibration_file()).get(ranks.device_name()))
    beside_tensors = (constants.runtime_bytes, constants.reserved_ratio or 1.0) if constants else ()
    micro_batch_size = choose_micro_batch(run, world.size, ranks.memory_bytes(world), device, *beside_tensors)

    def predict(way: Way) -> MemoryEstimate:
        return estimate_memory(way.run, way.world_size, way.micro_batch_size, device=device)

    needs = exhausted.Needs(Way(run, world.size, micro_batch_size), predict, world)
    batch = resolve_batch(spec.batch, world.size, micro_batch_size)
    steps = train_steps(spec.training, batch.tokens_per_step)
    ds_config = build_ds_config(spec, world.size, device, micro_batch_size)
    data = inputs.ready_data(spec, folder)
    passport = ranks.on_rank_0(lambda: make_passport(spec, world.size, ranks.device_name(), data))
    if checkpoint is not None:
        ranks.on_rank_0(lambda: check_same_data(checkpoint, passport))

    # Model, state and data, at the same step.
    memory = MemoryMeter(allocator(device))
    with exhausted.explained(needs, memory, "at the start of the engine"):
        engine = start_engine(spec, ds_config)
    torch.manual_seed(spec.seed + world.rank)  # for dropout: weights and data have generators of their own
    if checkpoint is not None and (change := conversion(engine, checkpoint)) is not None:
        logger.info("%s", change)
    with ranks.together():
        first_step = load_checkpoint(engine, checkpoint) if checkpoint is not None else 0
        read_training = inputs.open_training(data, spec, batch, world)
        validation = inputs.open_validation(data, spec, batch, world)
        shares = evaluation.mix_shares(spec.data, read_manifest(data))
    ranks.on_rank_0(lambda: describe_run(folder, spec, ds_config, passport))

    watch = open_watch(spec, batch, world, folder, first_step, checkpoint)
    saver = CheckpointSaver(engine, folder.checkpoints, spec.checkpoint, spec.training.precision)
    with (
        contextlib.closing(saver),
        metrics.open_recorder(spec, folder, batch, world, first_step, steps, memory) as record,
        exhausted.explained(needs, memory, "between the phases of a step"),
    ):

        def roll_back() -> int:
            saver.finish()
            last = first_sound(ranks.on_rank_0(lambda: candidates("auto", folder.checkpoints))) or checkpoint
            step = load_checkpoint(engine, last)
            record.go_back(step)
            return step

        done = train(
            engine,
            lambda step: read_training(step, watch.skipped_batches),
            first_step=first_step,
            train_steps=steps,
            evaluation_interval=spec.evaluation.interval,
            checkpoint_interval=spec.checkpoint.interval,
            learning_rate=functools.partial(
                schedule.learning_rate,
                schedule=spec.schedule,
                peak=spec.optimizer.learning_rate,
                train_steps=steps,
            ),
            evaluate=functools.partial(evaluation.evaluate, engine, validation, shares),
            saver=saver,
            record=record,
            watch=watch,
            roll_back=roll_back,
            stop=stop,
            memory=memory,
        )
    memory_report.conclude(folder.memory, predict(needs.way), engine, memory.measured, steps=done - first_step)
    if done < steps:
        asked = stop.signal.name if stop.signal else "a signal to another rank"
        watch.history.append("stopped", done, by=asked)
        logger.info("stopped by %s after step %d of %d; saved: the same command goes on from there", asked, done, steps)
    else:
        watch.history.append("finished", done)
        logger.info("trained to step %d of %d; the run is in %s", done, steps, folder.path)


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
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a field")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
