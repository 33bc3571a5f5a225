"""Every shipped preset validates, fits the numbers that it names, and survives a round trip."""

from __future__ import annotations

import pytest

from dsllm.plan.batch import micro_batch_choices
from dsllm.plan.memory import estimate_memory
from dsllm.plan.search import choose_micro_batch
from dsllm.plan.workload import workload
from dsllm.spec.load import PRESETS, dump_spec, load_spec, parse_spec, preset_names
from dsllm.spec.yaml_text import parse_yaml

GIB = 2**30


def test_the_presets_are_those_of_the_documentation() -> None:
    assert preset_names() == [
        "1b",
        "gpt2-124m",
        "gpt2-1558m",
        "gpt2-350m",
        "gpt2-774m",
        "lillm-39m",
        "llama-1b",
        "llama-248m",
        "llama-7b",
        "mixtral-8x124m",
        "quickstart",
    ]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_dumps_and_loads_back_equal(name: str) -> None:
    spec = load_spec(name)
    assert parse_spec(parse_yaml(dump_spec(spec), name), name) == spec


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_found_with_and_without_its_suffix_and_by_its_path(name: str) -> None:
    assert load_spec(name) == load_spec(f"{name}.yaml") == load_spec(str(PRESETS / f"{name}.yaml"))


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_runs_on_one_to_eight_ranks_and_fits_eight_large_gpus(name: str) -> None:
    spec = load_spec(name)
    for world_size in (1, 2, 4, 8):
        assert micro_batch_choices(spec.batch.global_batch_size, world_size)
    micro_batch_size = choose_micro_batch(workload(spec), 8 if name != "quickstart" else 2, 79 * GIB)
    assert estimate_memory(workload(spec), 8, micro_batch_size).fits(79 * GIB)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_shrinks_to_two_steps(name: str) -> None:
    spec = load_spec(name, ["training.train_steps=2", "schedule.warmup_steps=1", "model.num_layers=1"])
    assert spec.train_steps == 2


def test_the_quickstart_is_small_and_needs_no_download() -> None:
    spec = load_spec("quickstart")
    assert 2_000_000 <= estimate_memory(workload(spec), 2, 1).parameters <= 5_000_000
    assert [source.kind for source in spec.data.sources] == ["python-stdlib"]
    assert spec.tokenizer.kind == "sentencepiece"
