"""The catalogue of hardware: its names, its figures, and a user's own file over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsllm.errors import UserError
from dsllm.plan.hardware import Gpu, catalogue, gpu_named, gpu_of_device, gpus, with_user_file

GIB = 2**30


def test_gpus_are_listed_by_memory_under_names_of_their_own() -> None:
    assert [gpu.memory_bytes for gpu in gpus()] == sorted(gpu.memory_bytes for gpu in gpus())
    assert len({gpu.name for gpu in catalogue()}) == len(catalogue())
    assert [gpu.name for gpu in catalogue()] == [*(gpu.name for gpu in gpus()), "cpu"]


@pytest.mark.parametrize("gpu", catalogue(), ids=lambda gpu: gpu.name)
def test_every_figure_says_where_it_is_from(gpu: Gpu) -> None:
    figures = {"flops", "memory_bytes_per_second", "link_bytes_per_second", "network_bytes_per_second"}
    assert figures | {"price_per_hour"} <= set(gpu.sources)
    assert "https://" in gpu.sources["price_per_hour"]
    assert "20" in gpu.sources["price_per_hour"]  # the date


def test_a_price_of_no_provider_says_so() -> None:
    assert gpu_named("rtx-4090").sources["price_per_hour"].startswith("one calculator's figure and no provider's list")


@pytest.mark.parametrize("gpu", catalogue(), ids=lambda gpu: gpu.name)
def test_figures_are_of_a_plausible_size(gpu: Gpu) -> None:
    assert gpu.runtime_bytes < gpu.memory_bytes / 4
    assert all(1e12 <= flops <= 1e16 for flops in gpu.flops.values())
    assert gpu.flops["fp32"] <= gpu.peak_flops
    assert 0.5 <= gpu.matmul_share < 1
    assert gpu.network_bytes_per_second <= gpu.link_bytes_per_second <= gpu.memory_bytes_per_second


def test_a_figure_of_the_catalogue_is_that_of_the_data_sheet() -> None:
    gpu = gpu_named("a100-40gb")
    assert (gpu.peak_flops, gpu.flops["tf32"], gpu.memory_bytes_per_second) == (312e12, 156e12, 1.555e12)
    assert gpu.memory_bytes == int(39.38 * GIB)


def test_a_gpu_without_bf16_has_no_peak_for_it() -> None:
    assert [gpu.name for gpu in gpus() if not gpu.has_bf16] == ["t4-16gb", "v100-32gb"]
    assert gpu_named("t4").peak_flops == 65e12


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("Tesla T4", "t4-16gb"),
        ("NVIDIA A10G", "a10g-24gb"),
        ("NVIDIA L4", "l4-24gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090-24gb"),
        ("NVIDIA B200", "b200-180gb"),
        ("cpu", "cpu"),
    ],
)
def test_a_device_is_known_by_the_name_that_cuda_reports(device: str, name: str) -> None:
    gpu = gpu_of_device(device)
    assert gpu is not None
    assert gpu.name == name


@pytest.mark.parametrize("device", ["NVIDIA L40S", "Tesla V100-SXM2-16GB", "NVIDIA H100 PCIe", "NVIDIA A10"])
def test_a_device_that_is_not_in_the_catalogue_is_not_taken_for_another(device: str) -> None:
    assert gpu_of_device(device) is None


def test_a_gpu_may_be_named_without_its_memory_where_one_is_meant() -> None:
    assert gpu_named("H100").name == "h100-80gb"
    with pytest.raises(UserError, match="GPU: given 'a100'; must be one of a100-40gb, a100-80gb"):
        gpu_named("a100")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("h10", "did you mean h100-80gb"), ("a100-48gb", "did you mean a100-80gb or a100-40gb"), ("rtx4090", "rtx-4090")],
)
def test_an_unknown_gpu_is_answered_with_the_nearest_names(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"GPU: given '{name}', which is not known; .*{nearest}"):
        gpu_named(name)


def test_a_name_that_is_near_to_none_is_answered_with_all_of_them() -> None:
    with pytest.raises(UserError, match=r"must be one of t4-16gb, .*, cpu, or stand in a --hardware file"):
        gpu_named("gaudi")


# --- a user's own file --------------------------------------------------------------------------------------------


def own_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_users_file_replaces_single_figures(tmp_path: Path) -> None:
    known = with_user_file(own_file(tmp_path, "a100-40gb: {price_per_hour: 1.10, flops: {bf16: 300e12}}"))
    mine, shipped = gpu_named("a100-40gb", known), gpu_named("a100-40gb")
    assert (mine.price_per_hour, mine.flops["bf16"], mine.flops["fp16"]) == (1.10, 300e12, 312e12)
    assert mine.memory_bytes == shipped.memory_bytes
    assert shipped.price_per_hour == 1.99


def test_a_users_file_adds_a_device_with_defaults_for_the_rest(tmp_path: Path) -> None:
    text = "l40s-48gb:\n  memory_gib: 44.5\n  flops: {bf16: 362e12}\n  memory_bytes_per_second: 864e9\n"
    known = with_user_file(own_file(tmp_path, text + "  device_names: L40S\n"))
    assert [gpu.memory_bytes for gpu in known[:-1]] == sorted(gpu.memory_bytes for gpu in known[:-1])
    found = gpu_of_device("NVIDIA L40S", known)
    assert found is not None
    assert (found.name, found.gpus_per_node, found.price_per_hour) == ("l40s-48gb", 8, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "not a catalogue of hardware; a name and its figures"),
        ("mine: 7", "mine: given 7; must be a mapping of figures"),
        ("mine: {memory: 7}", "mine: unknown figure 'memory'; must be one of memory_gib"),
        ("mine: {memory_gib: 24}", "mine: no flops, memory_bytes_per_second; a new device needs memory"),
        (
            "mine: {memory_gib: 24, flops: {fp32: 1e13}, memory_bytes_per_second: 1e12}",
            "mine: no flops of bf16 or fp16; a new device needs",
        ),
        ("a100-40gb: {memory_gib: 0}", "a100-40gb: memory_gib: given 0; must be a number above 0"),
        ("a100-40gb: {price_per_hour: -1}", "price_per_hour: given -1; must be a number above 0"),
        ("a100-40gb: {price_per_hour: true}", "price_per_hour: given True; must be a number above 0"),
        ("a100-40gb: {flops: {fp8: 1e15}}", "flops: given .*; must be FLOP a second by type, of bf16, fp16"),
        ("a100-40gb: {flops: {bf16: -1}}", "flops.bf16: given -1; must be a number above 0"),
        (
            "a100-40gb: {gpus_per_node: 0.3}",
            "gpus_per_node: given 0.3; must be a whole number from 1; a node holds ",
        ),
        ("a100-40gb: {gpus_per_node: 2.6}", "gpus_per_node: given 2.6; must be a whole number from 1"),
        ("a100-40gb: {matmul_share: 7}", "matmul_share: given 7; must be a share, above 0 and at most 1"),
        ("a100-40gb: {reserved_ratio: 1.1}", "unknown figure 'reserved_ratio'; must be one of"),
        ("a100-40gb: {link: carrier pigeon}", "link: given 'carrier pigeon'; must be nvlink or pcie"),
    ],
)
def test_a_faulty_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        with_user_file(own_file(tmp_path, text))
    assert "\n" not in str(error.value)
    assert "mine.yaml: " in str(error.value)


def test_names_of_a_users_file_are_read_in_lower_case(tmp_path: Path) -> None:
    new = "L40S-48GB: {memory_gib: 44.5, flops: {bf16: 362e12}, memory_bytes_per_second: 864e9}"
    known = with_user_file(own_file(tmp_path, new + "\nA100-40GB: {price_per_hour: 1.10, gpus_per_node: 4.0}\n"))
    assert {gpu_named(name, known).name for name in ("l40s-48gb", "L40S-48GB", "l40s")} == {"l40s-48gb"}
    assert gpu_named("a100-40gb", known).price_per_hour == 1.10
    assert gpu_named("a100-40gb", known).gpus_per_node == 4
    assert len(known) == len(catalogue()) + 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        with_user_file(tmp_path / "nowhere.yaml")
