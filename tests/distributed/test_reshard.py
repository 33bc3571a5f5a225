"""A checkpoint of any stage and number of ranks goes on at any other: the same samples, losses and moments."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dsllm.checkpoint.convert import convert
from dsllm.checkpoint.states import MASTER, open_states
from tests.distributed.harness import run_python_ranks
from tests.distributed.test_resume import arguments, records
from tests.small_text import write_corpus

pytestmark = pytest.mark.distributed

PLACES = [(0, 1), (0, 2), *itertools.product((1, 2, 3), (1, 2, 3))]
"""Stage and ranks."""
SAVED, STEPS, BATCH = 4, 14, 12
SAMPLE = [
    *[((3, 3), place) for place in ((0, 1), (1, 2), (2, 1), (3, 2))],
    *[((2, 2), place) for place in ((0, 2), (1, 3), (3, 1), (2, 3))],
    *[((1, 1), place) for place in ((2, 2), (3, 3))],
    *[((0, 2), place) for place in ((3, 2), (1, 1), (2, 1))],
]
"""What `make test` resumes: every stage to every other, every number of ranks to every other."""

Place = tuple[int, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshard")


def flags(folder: Path, run: Path, stage: int) -> list[str]:
    return arguments(
        write_corpus(folder / "corpus"),
        run,
        stage,
        f"batch={{sequence_length: 32, global_batch_size: {BATCH}, micro_batch_size: 2}}",
        "model={family: gpt2, num_layers: 2, hidden_size: 66, num_attention_heads: 3}",
        f"training={{train_steps: {STEPS}, precision: fp32}}",
        f"checkpoint={{interval: {SAVED}, keep_last: 9}}",
        "evaluation={interval: 100, batches: 1}",
        "guards={step_0_checks: false}",
    )


def start(function: str, folder: Path, ranks: int, **arguments: Any) -> list[Any]:
    file = Path(__file__).with_name("reshard_runs.py")
    return run_python_ranks(file, function, arguments, num_ranks=ranks, timeout_seconds=900)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[Place, list[Any]]:
    """By place: what each rank told of a run from beginning to end, with checkpoints on the way."""
    told: dict[Place, list[Any]] = {}
    for ranks in (1, 2, 3):
        places = [place for place in PLACES if place[1] == ranks]
        runs = [flags(folder, run_of(folder, place), place[0]) for place in places]
        of_ranks = start("train_each", folder, ranks, runs=runs)
        told |= {place: [rank[index] for rank in of_ranks] for index, place in enumerate(places)}
    assert all(rank["status"] == 0 for of_ranks in told.values() for rank in of_ranks), told
    return told


def run_of(folder: Path, place: Place) -> Path:
    return folder / f"stage{place[0]}-ranks{place[1]}"


def resumed(folder: Path, cases: list[tuple[Place, Place]]) -> dict[tuple[Place, Place], list[Any]]:
    """By source and target: what each rank told of a run that went on from the source's checkpoint."""
    told: dict[tuple[Place, Place], list[Any]] = {}
    for ranks in (1, 2, 3):
        own = [case for case in cases if case[1][1] == ranks]
        runs = []
        for case in own:
            copy_checkpoint(run_of(folder, case[0]), again(folder, case))
            runs.append(flags(folder, again(folder, case), case[1][0]))
        resaved = [str(resaved_in(folder, case)) for case in own]
        of_ranks = start("resume_each", folder, ranks, runs=runs, resaved=resaved) if own else []
        told |= {case: [rank[index] for rank in of_ranks] for index, case in enumerate(own)}
    return told


def again(folder: Path, case: tuple[Place, Place]) -> Path:
    return folder / f"{run_of(folder, case[0]).name}-to-{run_of(folder, case[1]).name}"


def resaved_in(folder: Path, case: tuple[Place, Place]) -> Path:
    return again(folder, case) / "resaved"


def copy_checkpoint(source: Path, target: Path) -> None:
    """A run that was stopped at step SAVED."""
    name = f"global_step{SAVED}"
    shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
    (target / "checkpoints" / "latest").write_text(name)
    for file in ("spec.yaml", "passport.json", "metrics.jsonl"):
        shutil.copy(source / file, target / file)


def samples_by_step(of_ranks: list[Any], first_step: int) -> list[list[str]]:
    """The samples that each step read, over all ranks; what was read ahead is left out."""
    share = BATCH // len(of_ranks)
    return [
        sorted(
            sample
            for rank in of_ranks
            for sample in rank["read"][(step - first_step) * share : (step - first_step + 1) * share]
        )
        for step in range(first_step, STEPS)
    ]


def check(folder: Path, undisturbed: dict[Place, list[Any]], cases: list[tuple[Place, Place]]) -> None:
    for case, of_ranks in resumed(folder, cases).items():
        assert [rank["status"] for rank in of_ranks] == [0] * case[1][1], (case, of_ranks)
        losses = [record["loss"] for record in records(again(folder, case))]
        expected = [record["loss"] for record in records(run_of(folder, case[0]))]
        assert losses[SAVED:] == pytest.approx(expected[SAVED:], rel=1e-4), case
        if case[0] == case[1]:
            assert losses == expected, case
        everything = samples_by_step(undisturbed[case[0]], 0)
        assert samples_by_step(of_ranks, SAVED) == everything[SAVED:], case
        name = f"global_step{SAVED}"
        assert_same_states(run_of(folder, case[0]) / "checkpoints" / name, resaved_in(folder, case) / name)
        log = (again(folder, case) / "logs" / "rank0.log").read_text()
        assert ("converting global_step4, written by" in log) == (case[0] != case[1]), case


def assert_same_states(one: Path, other: Path) -> None:
    """Weights and moments of every parameter are the same bits."""
    first, second = open_states(one), open_states(other)
    assert first.shapes == second.shapes
    assert first.adam_step == second.adam_step == SAVED
    assert [first.moments(name) for name in first.shapes] == [second.moments(name) for name in first.shapes]
    for name, shape in first.shapes.items():
        for kind in (MASTER, *first.moments(name)):
            a, b = torch.empty(torch.Size(shape).numel()), torch.empty(torch.Size(shape).numel())
            first.copy(kind, name, 0, a)
            second.copy(kind, name, 0, b)
            assert torch.equal(a, b), (one, other, kind, name)
            assert a.any() or kind == "fp32", "nothing was compared"


def test_a_sample_of_the_matrix_goes_on_as_if_undisturbed(folder: Path, undisturbed) -> None:
    check(folder, undisturbed, [*SAMPLE, ((2, 2), (2, 2)), ((3, 3), (3, 3))])


def test_a_converted_checkpoint_goes_on_at_any_stage_and_in_another_precision(folder: Path, undisturbed) -> None:
    source = run_of(folder, (3, 3))
    universal, _ = convert(source / "checkpoints" / f"global_step{SAVED}", folder / "archive")
    cases = [(stage, *extra) for stage in (0, 1, 2, 3) for extra in ([], ["training.precision=bf16"])]
    runs = [folder / f"from-archive-{number}" for number in range(len(cases))]
    arguments = [
        [*flags(folder, run, stage), "--resume", str(universal), *[word for one in extra for word in ("--set", one)]]
        for run, (stage, *extra) in zip(runs, cases, strict=True)
    ]
    resaved = [str(run / "resaved") for run in runs]
    of_ranks = start("resume_each", folder, 2, runs=arguments, resaved=resaved)
    assert [[told["status"] for told in rank] for rank in of_ranks] == [[0] * len(cases)] * 2, of_ranks
    expected = [record["loss"] for record in records(source)][SAVED:]
    for run, (_, *extra) in zip(runs, cases, strict=True):
        losses = [record["loss"] for record in records(run)]
        assert losses == pytest.approx(expected, rel=2e-2 if extra else 1e-4), run
        assert_same_states(source / "checkpoints" / f"global_step{SAVED}", run / "resaved" / f"global_step{SAVED}")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_stage_and_number_of_ranks_goes_on_at_every_other(folder: Path, undisturbed) -> None:
    check(folder, undisturbed, [case for case in itertools.product(PLACES, PLACES) if case not in SAMPLE])
