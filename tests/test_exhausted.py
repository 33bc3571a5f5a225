"""Which errors are exhausted memory, and what is said; tests/distributed/test_out_of_memory.py runs out for real."""

from __future__ import annotations

import re

import pytest
import torch

from dsllm.engine.exhausted import Needs, explained, is_exhaustion
from dsllm.engine.memory_meter import MemoryMeter
from dsllm.engine.ranks import World
from dsllm.errors import OneRankError
from dsllm.plan.memory import MemoryEstimate, estimate_memory
from dsllm.plan.way import Way
from dsllm.plan.workload import workload
from dsllm.spec.load import load_spec

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 8 MiB is free."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 "
    "bytes. Error code 12"
)
START = "at the start of the engine"


def needs(*overrides: str) -> Needs:
    run = workload(load_spec("1b", list(overrides)))

    def predict(way: Way) -> MemoryEstimate:
        return estimate_memory(way.run, way.world_size, way.micro_batch_size)

    return Needs(Way(run, 8, run.micro_batch_size), predict, World(5, 8, 8))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(CUDA), RuntimeError(CPU), MemoryError(), RuntimeError("std::bad_alloc")]
)
def test_every_allocators_error_is_exhaustion(error: Exception) -> None:
    assert is_exhaustion(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("memory")])
def test_any_other_error_is_itself(error: Exception) -> None:
    assert not is_exhaustion(error)
    with pytest.raises(type(error)) as raised, explained(needs(), MemoryMeter(None), START):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError(CUDA), "CUDA out of memory"),
        (RuntimeError(CPU), "can't allocate memory: you tried to allocate 8 bytes"),
        (MemoryError(), "no more memory"),
    ],
)
def test_a_phase_is_named_with_its_largest_terms_and_the_smallest_change(error: Exception, words: str) -> None:
    memory = MemoryMeter(None)
    plain = needs("training.loss=plain")
    with pytest.raises(OneRankError) as raised, explained(plain, memory, START), memory.phase("backward"):
        raise error
    line = str(raised.value)
    assert line.startswith("rank 5: out of memory in backward; predicted for it are ")
    terms = re.search(r"are (\w+) ([\d.]+) GiB, (\w+) ([\d.]+) GiB, (\w+) ([\d.]+) GiB, ([\d.]+) GiB in all", line)
    sizes = [float(terms[index]) for index in (2, 4, 6)]
    assert sizes == sorted(sizes, reverse=True)
    taken = float(re.search(r"; to fit, --set batch.micro_batch_size=\d+ takes ([\d.]+) GiB", line)[1])
    assert taken < float(terms[7])
    assert line.endswith(f" ({words})")


def test_outside_every_phase_it_is_what_the_caller_does_and_the_prediction_is_what_stays() -> None:
    memory = MemoryMeter(None)
    with memory.phase("step"):
        pass
    said = (
        r"^rank 5: out of memory at the start of the engine; predicted for it are parameters 1\.99 GiB, optimizer 1\.49"
    )
    with pytest.raises(OneRankError, match=said), explained(needs(), memory, START):
        raise MemoryError


def test_where_no_change_takes_less_that_is_said_with_the_least() -> None:
    least = ["zero={stage: 3, offload_optimizer: cpu, offload_param: cpu}", "training.activation_checkpointing=full"]
    smallest = needs(*least, "batch.micro_batch_size=1", "batch.global_batch_size=8")
    said = r"nothing .*takes less than that; the least is "
    with pytest.raises(OneRankError, match=said), explained(smallest, MemoryMeter(None), START):
        raise MemoryError
