"""Kills a run again and again, at seeded random moments, and holds it to its promises each time it starts again.

python -m tests.distributed.chaos --kills 100 --seed 1 --output benchmarks/results/chaos-cpu.json

Ranks are killed with SIGKILL: one or all of them, between and within steps, while a checkpoint is being written, while
the run resumes; and so is `dsllm checkpoints convert`. After each kill the run must go on from the last checkpoint that
was complete, and in the end each step must have the loss, to the bit, that it has in a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dsllm.checkpoint.layout import complete_folders, is_complete, step_folders, step_of, universal_folder
from dsllm.checkpoint.verify import faults_of
from tests.distributed.harness import ROOT, RanksFailed, run_ranks
from tests.small_text import write_corpus

TRAIN = ROOT / "dsllm" / "train.py"
TIMEOUT_SECONDS = 240
LONGEST = 10_000
"""Steps that no run here comes to."""
KINDS = ("one rank", "all ranks", "during a save", "during a resume", "during a conversion")


@dataclass
class Chaos:
    """One run, and what has been done to it."""

    folder: Path
    stage: int
    random: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    steps_repeated: int = 0
    """Done, but not saved when a kill came."""
    last_complete: int = 0
    """Steps of the newest complete checkpoint at the last kill."""

    @property
    def run(self) -> Path:
        return self.folder / f"stage{self.stage}"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def arguments(self, run: Path, train_steps: int) -> list[str]:
        """A schedule that does not depend on the run's length, and dropout, so that random states count."""
        corpus = write_corpus(self.folder / "corpus")
        settings = [
            f"data={{sources: [{{kind: text, path: '{corpus}'}}], validation_fraction: 0.1, max_epochs: 1000, "
            f"directory: '{corpus}-tokens'}}",
            "model={family: gpt2, num_layers: 2, hidden_size: 128, num_attention_heads: 4, dropout: 0.1}",
            "tokenizer={kind: sentencepiece, vocab_size: 400}",
            "batch={sequence_length: 32, global_batch_size: 8, micro_batch_size: 2}",
            f"training={{train_steps: {train_steps}, precision: fp32}}",
            "schedule={name: constant, warmup_steps: 2, min_learning_rate_ratio: 0.1}",
            f"zero={{stage: {self.stage}}}",
            "checkpoint={interval: 3, keep_last: 2}",
            "evaluation={interval: 1000, batches: 1}",
            "guards={step_0_checks: false}",
            "logging={tensorboard: false}",
        ]
        return [
            "--spec",
            "quickstart",
            "--run-dir",
            str(run),
            *[word for value in settings for word in ("--set", value)],
        ]

    def kill_once(self, kind: str) -> None:
        """Let the run go on, and kill it in one way; then see what is left."""
        if kind == "during a conversion":
            self._kill_a_conversion()
        else:
            logged_before = len(self.log())
            self._train_and(lambda: self._kill(kind))
            self._check_resumed_from(self.log()[logged_before:])
        complete = complete_folders(self.checkpoints)
        self.last_complete = step_of(complete[-1]) if complete else 0
        assert self.last_complete >= self.last_saved(), "a checkpoint that was called saved is not complete"
        self.kills[kind] += 1
        self.steps_repeated += self.steps_done() - self.last_complete if kind != "during a conversion" else 0

    def finish(self) -> None:
        """Run to an end without a disturbance, and compare every step with those of an undisturbed run."""
        steps = self.steps_done() + 2
        ended = run_ranks([TRAIN, *self.arguments(self.run, steps)], num_ranks=2, timeout_seconds=TIMEOUT_SECONDS)
        self._check_resumed_from(ended.rank_outputs[0] + self.log())
        undisturbed = self.folder / f"undisturbed{self.stage}"
        run_ranks([TRAIN, *self.arguments(undisturbed, steps)], num_ranks=2, timeout_seconds=TIMEOUT_SECONDS)
        expected, found = records(undisturbed), records(self.run)
        assert [record["step"] for record in found] == list(range(1, steps + 1))
        for name in ("loss", "grad_norm"):
            assert [record[name] for record in found] == [record[name] for record in expected], name

    def steps_done(self) -> int:
        return len(records(self.run))

    def log(self) -> str:
        path = self.run / "logs" / "rank0.log"
        return path.read_text() if path.is_file() else ""

    def last_saved(self) -> int:
        return max((int(step) for step in re.findall(r"saved \S*global_step(\d+)", self.log())), default=0)

    def _check_resumed_from(self, log: str) -> None:
        """Where it got so far as to choose a checkpoint: the last complete one, with no word of damage."""
        chosen = re.findall(r"going on from \S*global_step(\d+)", log)
        assert not chosen or int(chosen[-1]) >= self.last_complete, "went further back than the last checkpoint"
        assert "going back to" not in log, "a checkpoint was damaged, or not there"

    def _train_and(self, disturb: Callable[[], None]) -> None:
        """Start the run; it must not end by itself."""
        ends: list[Any] = []

        def train() -> None:
            script = [TRAIN, *self.arguments(self.run, LONGEST)]
            try:
                ends.append(run_ranks(script, num_ranks=2, timeout_seconds=TIMEOUT_SECONDS, check=False))
            except RanksFailed as error:
                ends.append(error)

        thread = threading.Thread(target=train)
        thread.start()
        try:
            disturb()
        finally:
            kill(self.ranks())
            thread.join()
        assert not isinstance(ends[0], RanksFailed), ends[0]
        assert ends[0].returncode != 0, "ended well, although it was killed"

    def _kill(self, kind: str) -> None:
        if kind == "during a resume":
            self._wait(lambda: len(self.ranks()) == 2)
            time.sleep(self.random.uniform(0, 6))
        else:
            wanted = self.steps_done() + self.random.randrange(1, 8)
            self._wait(lambda: self.steps_done() >= wanted)
            if kind == "during a save":
                self._wait(self._is_saving)
            time.sleep(self.random.uniform(0, 0.05))
        victims = self.ranks()
        kill(victims if kind != "one rank" else self.random.sample(victims, 1))
        if kind == "one rank":
            self._wait(lambda: not self.ranks())  # the others must not wait for it for ever

    def _is_saving(self) -> bool:
        return any(not is_complete(folder) for folder in step_folders(self.checkpoints)[-1:])

    def _kill_a_conversion(self) -> None:
        """Of the newest checkpoint; nothing half may be left in its place, and it works when it is run again."""
        complete = complete_folders(self.checkpoints)
        if not complete:
            return
        target = universal_folder(complete[-1])
        command = [sys.executable, "-m", "dsllm.cli.app", "checkpoints", "convert", str(complete[-1])]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as conversion:
            partial = target.with_name(target.name + ".partial")
            self._wait(lambda: partial.exists() or target.exists() or conversion.poll() is not None)
            time.sleep(self.random.uniform(0, 0.2))
            conversion.kill()
        if not target.exists():
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        assert faults_of(target) == []
        assert faults_of(complete[-1]) == []
        subprocess.run(["rm", "-r", str(target)], check=True)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train into the run; the launcher's own name the script too, but not as the first word."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if str(self.run) in (line := process.info["cmdline"] or [])
            and "-m" not in line
            and "deepspeed" not in line[1]
        ]

    def _wait(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not is_so():
            assert time.monotonic() < deadline, f"nothing happened for {TIMEOUT_SECONDS} s\n{self.log()[-2000:]}"
            time.sleep(0.002)


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with_signal(process, signal.SIGKILL)


def with_signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def records(run: Path) -> list[dict[str, Any]]:
    """What a run has told of its steps; a line that a kill has torn is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run_chaos(folder: Path, kills: int, seed: int, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """`kills` of all kinds, over the stages in turn: what was done. Raises AssertionError for a broken promise."""
    source = random.Random(seed)
    started = time.monotonic()
    stages = {stage: Chaos(folder, stage, source) for stage in (2, 3, 1)[: max(1, min(3, kills // 5))]}
    for number in range(kills):
        chaos = stages[list(stages)[number % len(stages)]]
        kind = KINDS[(number // len(stages)) % len(KINDS)]
        chaos.kill_once(kind)
        say(f"{number + 1}/{kills} stage {chaos.stage} {kind}: {chaos.steps_done()} steps, safe {chaos.last_complete}")
    for chaos in stages.values():
        chaos.finish()
        say(f"stage {chaos.stage}: every step as in an undisturbed run")
    return {
        "seed": seed,
        "kills": {kind: sum(chaos.kills[kind] for chaos in stages.values()) for kind in KINDS},
        "stages": sorted(stages),
        "ranks": 2,
        "steps_repeated": sum(chaos.steps_repeated for chaos in stages.values()),
        "seconds": round(time.monotonic() - started),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run_chaos(Path(folder), arguments.kills, arguments.seed, say=lambda line: print(line, flush=True))
    print(json.dumps(result))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
