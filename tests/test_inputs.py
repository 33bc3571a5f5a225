"""What stands between a spec and the loop: tokens made where that is quick, opened, and told about."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small_text import text_spec, write_corpus

from dsllm.data.run_samples import open_run_samples
from dsllm.engine import inputs
from dsllm.engine.ranks import World
from dsllm.engine.run_folder import RunFolder
from dsllm.errors import DataError, UserError
from dsllm.plan.batch import BatchPlan, resolve_batch
from dsllm.spec.sections import Spec

ALONE = World(rank=0, size=1, local_size=1)


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def small_spec(folder: Path, *overrides: str) -> Spec:
    settings = ["batch={sequence_length: 32, global_batch_size: 8, micro_batch_size: 2}", "training.train_steps=600"]
    corpus = write_corpus(folder / "corpus")
    return text_spec(corpus, f"data.directory={folder / 'data'}", *settings, *overrides)


def batch_of(spec: Spec) -> BatchPlan:
    return resolve_batch(spec.batch, 1)


def test_small_text_is_prepared_and_packed_at_the_start(tmp_path: Path) -> None:
    spec = small_spec(tmp_path, "data.packing=best_fit")
    folder = RunFolder(tmp_path / "run")
    directory = inputs.ready_data(spec, folder)
    assert (folder.tokenizer / "tokenizer.json").is_file()
    assert len(list(directory.glob("*.plan"))) == 2
    assert inputs.ready_data(spec, folder) == directory


def test_training_begins_at_its_step(tmp_path: Path) -> None:
    spec = small_spec(tmp_path)
    directory = inputs.ready_data(spec, RunFolder(tmp_path / "run"))
    batches = inputs.open_training(directory, spec, batch_of(spec), ALONE)(7, ())
    read = torch.cat([batch["input_ids"] for batch in islice(batches, 4)])
    samples = open_run_samples(directory, spec.data, 32, spec.seed)
    assert read.tolist() == samples.read(samples.draw(np.arange(56, 64))).inputs.tolist()


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_tells_how_often_each_source_will_be_seen(
    tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    spec = small_spec(tmp_path, "data.sources.0.label=words")
    directory = inputs.ready_data(spec, RunFolder(tmp_path / "run"))
    samples = len(open_run_samples(directory, spec.data, 32, spec.seed).sources[0])
    with caplog.at_level(logging.INFO):
        inputs.open_training(directory, spec, batch_of(spec), World(rank, 2, 2))
    told = [entry.getMessage() for entry in caplog.records if entry.name == inputs.logger.name]
    if rank:
        assert told == []
    else:
        epochs = f"{600 * 8 / samples:.3g}"
        first, second = told
        assert first == f"source 'words': 100.0% of the run's samples, {epochs} epochs of its {samples:,}"
        assert second.startswith(f"source 'words': the run sees it {epochs} times, more than data.max_epochs = 4; ")


def test_validation_sets_are_named_and_the_same_at_each_call(tmp_path: Path) -> None:
    exam = write_corpus(tmp_path / "exam", documents=3)
    spec = small_spec(tmp_path, f"data.validation_sources=[{{kind: text, path: '{exam}'}}]")
    directory = inputs.ready_data(spec, RunFolder(tmp_path / "run"))
    sets = inputs.open_validation(directory, spec, batch_of(spec), ALONE)
    assert list(sets) == ["corpus", "exam"]
    for open_set in sets.values():
        first, second = ([batch["labels"].tolist() for batch in open_set()] for _ in range(2))
        assert first
        assert first == second


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{kind: huggingface, name: Skylion007/openwebtext}", "a huggingface source"),
        ("{kind: deeplake, path: 'hub://activeloop/openwebtext-train'}", "a deeplake source"),
        ("{kind: text, path: LONG}", "about 400.0 MB of text"),
    ],
)
def test_text_that_takes_long_is_to_be_prepared_first(tmp_path: Path, source: str, what: str) -> None:
    with (tmp_path / "long.txt").open("wb") as file:
        file.truncate(400_000_000)
    spec = small_spec(tmp_path, f"data.sources=[{source.replace('LONG', str(tmp_path / 'long.txt'))}]")
    with pytest.raises(
        UserError,
        match=rf"data: no prepared tokens there, and with {what} every rank would wait .* first run dsllm data prepare",
    ):
        inputs.ready_data(spec, RunFolder(tmp_path / "run"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("text", "long.txt.gz"), ("jsonl", "long.jsonl.zst"), ("parquet", "long.parquet"), ("parquet", "long.data")],
)
def test_compressed_text_counts_as_what_it_may_unpack_to(tmp_path: Path, kind: str, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(61_000_000)
    spec = small_spec(tmp_path, f"data.sources=[{{kind: {kind}, path: '{tmp_path / name}'}}]")
    with pytest.raises(UserError, match=r"with about 305\.0 MB of text every rank would wait"):
        inputs.ready_data(spec, RunFolder(tmp_path / "run"))


def test_much_data_is_checked_by_the_edges_of_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec(tmp_path)
    directory = inputs.ready_data(spec, RunFolder(tmp_path / "run"))
    monkeypatch.setattr(inputs, "VERIFIED_TOKENS", 0)
    assert inputs.ready_data(spec, RunFolder(tmp_path / "run")) == directory
    shard = directory / "corpus-train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.bin changed or went missing since preparation"):
        inputs.ready_data(spec, RunFolder(tmp_path / "run"))


def test_a_damaged_plan_is_made_again_at_the_start(tmp_path: Path) -> None:
    spec = small_spec(tmp_path, "data.packing=best_fit")
    directory = inputs.ready_data(spec, RunFolder(tmp_path / "run"))
    plans = {path: path.read_bytes() for path in directory.glob("*.plan")}
    for path, content in plans.items():
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    inputs.ready_data(spec, RunFolder(tmp_path / "run"))
    assert {path: path.read_bytes() for path in plans} == plans


def test_text_that_is_not_there_is_told_before_anything_is_made(tmp_path: Path) -> None:
    spec = small_spec(tmp_path, f"data.sources=[{{kind: text, path: '{tmp_path / 'nowhere'}'}}]")
    with pytest.raises(DataError, match="nowhere"):
        inputs.ready_data(spec, RunFolder(tmp_path / "run"))
    assert not (tmp_path / "data").exists()
