"""What is said of a run's memory at its end: of every rank the largest, predicted beside measured."""

from __future__ import annotations

import pytest
import torch

from dsllm.engine.allocators import allocator
from dsllm.engine.memory_meter import MeasuredMemory, MemoryMeter
from dsllm.engine.memory_report import RankMemory, memory_report, report_lines
from dsllm.plan.memory import MemoryEstimate, Terms

MIB = 2**20


def rank(forward: int, backward: int, step: int, kept: int, **settings: int | None) -> RankMemory:
    peaks = {"forward": forward * MIB, "backward": backward * MIB, "step": step * MIB}
    measured = MeasuredMemory(peaks, kept * MIB, reserved_bytes=settings.get("reserved"))
    return RankMemory(measured, settings.get("parameters", 2) * MIB, 12 * MIB, settings.get("runtime"))


def estimate() -> MemoryEstimate:
    states = {"parameters_bytes": 2 * MIB, "optimizer_bytes": 12 * MIB, "runtime_bytes": 100 * MIB}
    phases = {
        "forward": Terms(**states, activations_bytes=40 * MIB),
        "backward": Terms(**states, gradients_bytes=4 * MIB, activations_bytes=44 * MIB),
        "step": Terms(**states, gradients_bytes=4 * MIB),
    }
    return MemoryEstimate(1, 1, 1, 1, 2, phases, Terms(**states, gradients_bytes=4 * MIB), 0)


RANKS = [rank(50, 60, 20, 18, reserved=70, runtime=5), rank(58, 64, 19, 20, parameters=3, reserved=80, runtime=6)]


def test_every_number_is_the_largest_of_all_ranks() -> None:
    measured = memory_report(estimate(), RANKS, "a device", is_settled=True)["measured"]
    assert measured["peak_bytes"] == {"forward": 58 * MIB, "backward": 64 * MIB, "step": 20 * MIB}
    assert (measured["reserved_bytes"], measured["runtime_bytes"]) == (80, 6)
    assert measured["terms"]["parameters_bytes"] == 3 * MIB


def test_terms_are_what_stays_and_what_each_phase_adds() -> None:
    report = memory_report(estimate(), RANKS, "a device", is_settled=True)
    names = ["gradients_and_buckets_kept_bytes", "forward_adds_bytes", "backward_adds_bytes", "step_adds_bytes"]
    assert [report["measured"]["terms"][name] // MIB for name in names] == [20 - 3 - 12, 58 - 20, 64 - 20, 0]
    # the device's runtime is none of torch's allocator
    assert [report["predicted"]["terms"][name] // MIB for name in names] == [4, 54 - 18, 62 - 18, 0]


def test_after_one_step_only_the_peak_and_the_states_are_compared() -> None:
    report = memory_report(estimate(), RANKS, "a device", is_settled=False)
    assert set(report["measured"]["terms"]) == {"peak_bytes", "parameters_bytes", "optimizer_bytes"}
    assert set(report["predicted"]["terms"]) == set(report["measured"]["terms"])


def test_lines_say_predicted_measured_and_by_how_much_they_differ() -> None:
    lines = report_lines(memory_report(estimate(), RANKS, "a device", is_settled=True))
    assert lines[0] == "memory  predicted 62.00 MiB, measured 64.00 MiB (-3.1%)"
    assert "  parameters  predicted 2.00 MiB, measured 3.00 MiB (-33.3%)" in lines
    assert "  step adds  predicted 0 B, measured 0 B" in lines  # next to nothing has no percentage


def test_what_was_held_before_does_not_count_and_what_is_kept_is_seen_before_forward() -> None:
    counted = allocator("cpu")
    if counted is None:
        pytest.skip("no C++ compiler: memory is not counted on this CPU")
    before = torch.zeros(7 * MIB, dtype=torch.uint8)
    memory = MemoryMeter(counted)
    kept = torch.zeros(2 * MIB, dtype=torch.uint8)
    with memory.phase("forward"):
        torch.zeros(5 * MIB, dtype=torch.uint8)
    assert memory.measured is not None
    assert 2 * MIB <= memory.measured.kept_bytes < 3 * MIB
    assert 7 * MIB <= memory.measured.peak_bytes["forward"] < 8 * MIB
    assert memory.measured.reserved_bytes is None
    del before, kept
