"""Measured runtime constants: their file, what a run says of them, and the command that measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsllm.errors import UserError
from dsllm.launch.devices import calibration_file
from dsllm.plan.calibration import (
    DeviceConstants,
    constants_of_gpu,
    constants_of_run,
    read_constants,
    reserved_ratio,
    with_constants,
    write_constants,
)
from dsllm.plan.cost import Machine
from dsllm.plan.hardware import gpu_named, with_user_file
from dsllm.plan.search import search
from dsllm.plan.workload import workload
from dsllm.spec.load import load_spec
from tests.test_cli import run

MIB = 2**20
A100 = DeviceConstants("NVIDIA A100-SXM4-40GB", 700 * MIB, 1.02, "dsllm calibrate")
CPU = DeviceConstants("cpu", 400 * MIB, None, "dsllm calibrate")
MEASURED = {
    "device": "NVIDIA H200",
    "predicted": {},
    "measured": {
        "peak_bytes": {"forward": 80 * MIB, "backward": 100 * MIB, "step": 90 * MIB},
        "reserved_bytes": 110 * MIB,
        "runtime_bytes": 600 * MIB,
    },
}


@pytest.fixture(autouse=True)
def _settings_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("DSLLM_DEBUG", "")


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_beside_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "calibration.json"
    assert read_constants(path) == {}
    write_constants(path, CPU)
    write_constants(path, A100)
    assert read_constants(path) == {"cpu": CPU, A100.device: A100}


def test_a_newer_measurement_replaces_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_constants(path, CPU)
    newer = DeviceConstants("cpu", 1, None, "runs/x")
    write_constants(path, newer)
    assert read_constants(path) == {"cpu": newer}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"devices": {"cpu": {"runtime_bytes": 1}}}',
        '{"devices": {"cpu": {"runtime_bytes": -1, "reserved_ratio": null, "source": ""}}}',
        '{"devices": {"cpu": {"runtime_bytes": 1, "reserved_ratio": 0.5, "source": ""}}}',
        '{"devices": {"cpu": {"runtime_bytes": "1", "reserved_ratio": null, "source": ""}}}',
    ],
)
def test_a_file_of_another_form_is_refused_with_the_way_out(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"calibration.json: not what dsllm calibrate writes .* delete it, and calibr"):
        read_constants(path)


def test_a_file_that_is_no_json_says_where(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"calibration.json: not valid JSON: .* line 1 column 2"):
        read_constants(path)


def test_the_file_lies_where_the_system_keeps_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibration_file() == tmp_path / "settings" / "dsllm" / "calibration.json"
    for unusable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CONFIG_HOME", unusable)
        assert calibration_file() == Path.home() / ".config" / "dsllm" / "calibration.json"


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_what_is_beside_tensors_by_hand() -> None:
    assert A100.beside(0) == 700 * MIB
    assert A100.beside(1000 * MIB) == 720 * MIB
    assert CPU.beside(1000 * MIB) == 400 * MIB


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_more_tensors_never_have_less_beside_them(some: int, more: int) -> None:
    assert A100.beside(some) <= A100.beside(some + more)


def test_the_ratio_is_unknown_without_both_peaks_and_never_below_one() -> None:
    assert reserved_ratio(110, 100) == 1.1
    assert reserved_ratio(90, 100) == 1.0
    assert reserved_ratio(None, 100) is None
    assert reserved_ratio(110, 0) is None


def test_a_device_is_found_by_its_name_in_the_catalogue() -> None:
    known = {one.device: one for one in (A100, CPU)}
    assert constants_of_gpu(known, gpu_named("a100-40gb")) == A100
    assert constants_of_gpu(known, gpu_named("a100-80gb")) is None
    assert constants_of_gpu(known, gpu_named("cpu")) == CPU


# --- a run's measurements ---------------------------------------------------------------------------------------------


def test_a_run_tells_what_was_beside_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    path.write_text(json.dumps(MEASURED))
    assert constants_of_run(path) == DeviceConstants("NVIDIA H200", 600 * MIB, 1.1, str(tmp_path))


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"device": "cpu", "measured": None},
        {**MEASURED, "measured": {**MEASURED["measured"], "runtime_bytes": None}},
    ],
)
def test_a_run_that_measured_no_such_thing_is_refused(tmp_path: Path, document: object) -> None:
    path = tmp_path / "memory.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="no memory beside tensors was measured there; take a run on a GPU"):
        constants_of_run(path)


# --- the command ------------------------------------------------------------------------------------------------------


def test_calibrating_from_a_run_changes_the_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "memory.json").write_text(json.dumps(MEASURED))
    arguments = ["estimate-memory", "--spec", "gpt2-124m", "--zero", "2", "--gpu", "h200", "--json"]
    before = json.loads(run(capsys, *arguments)[1])
    status, out, _ = run(capsys, "calibrate", "--from", str(tmp_path))
    assert status == 0
    assert out.startswith("NVIDIA H200: 600.00 MiB beside tensors, and the allocator takes 10.0% more than tensors")
    after = json.loads(run(capsys, *arguments)[1])
    tensors = after["per_gpu"]["total_bytes"] - after["per_gpu"]["runtime_bytes"]
    assert after["per_gpu"]["runtime_bytes"] == 600 * MIB + round(0.1 * tensors)
    assert tensors == before["per_gpu"]["total_bytes"] - before["per_gpu"]["runtime_bytes"]


def test_a_run_folder_without_measurements_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "calibrate", "--from", str(tmp_path))
    assert (status, out) == (2, "")
    assert err == f"dsllm: {tmp_path}/memory.json: cannot be read: No such file or directory; check the path\n"


def test_a_measuring_process_that_fails_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed", reason="measuring needs DeepSpeed")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # which no new Python survives
    status, out, err = run(capsys, "calibrate")
    assert (status, out) == (1, "")
    assert err.startswith("dsllm: calibrate: the small run failed: ")
    assert err.count("\n") == 1


def test_without_deepspeed_there_is_nothing_to_measure_with(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    status, _, err = run(capsys, "calibrate")
    assert status == 2
    assert err == (
        "dsllm: calibrate: given a machine without deepspeed; measuring needs it; pip install 'dsllm[train]'\n"
    )


@pytest.mark.distributed
def test_the_cpu_is_measured_by_a_real_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed", reason="measuring needs DeepSpeed")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("RANK", "3")  # of a run around it, which is none of its business
    status, out, err = run(capsys, "calibrate", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    kept = DeviceConstants("cpu", found["runtime_bytes"], None, "dsllm calibrate")
    assert read_constants(Path(found["file"])) == {"cpu": kept}
    # torch and DeepSpeed alone are resident with hundreds of MiB, and nothing else of size is
    assert 100 * MIB < found["runtime_bytes"] < 2048 * MIB


@pytest.mark.distributed
def test_a_gpu_is_measured_by_a_real_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="measuring needs torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    status, out, err = run(capsys, "calibrate", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["device"] == torch.cuda.get_device_name()
    # a context takes 200 MiB and more on any card; the allocator rounds up, and not by half
    assert 100 * MIB < found["runtime_bytes"] < 8192 * MIB
    assert 1.0 <= found["reserved_ratio"] < 1.5


# --- in a plan --------------------------------------------------------------------------------------------------------


def test_a_gpu_has_as_much_beside_tensors_as_was_calibrated() -> None:
    known = {one.device: one for one in (A100, CPU)}
    for name, constants in (("a100-40gb", A100), ("cpu", CPU)):
        gpu = with_constants(gpu_named(name), known)
        assert [gpu.beside(size * MIB) for size in (0, 1000)] == [constants.beside(size * MIB) for size in (0, 1000)]
    assert with_constants(gpu_named("h100-80gb"), known) == gpu_named("h100-80gb")


def test_a_users_own_device_has_its_calibration(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "l40s-48gb: {memory_gib: 44.5, flops: {bf16: 362e12}, memory_bytes_per_second: 864e9, device_names: L40S}"
    )
    devices = with_user_file(path)
    own = DeviceConstants("NVIDIA L40S", 700 * MIB, 1.02, "dsllm calibrate")
    assert constants_of_gpu({own.device: own}, gpu_named("l40s", devices)) == own
    assert with_constants(gpu_named("l40s", devices), {own.device: own}).runtime_bytes == 700 * MIB
    assert constants_of_gpu({own.device: own}, gpu_named("l4")) is None


@pytest.mark.parametrize("ratio", [None, 1.07])
def test_plan_and_estimate_memory_agree_about_a_calibrated_gpu(
    capsys: pytest.CaptureFixture[str], ratio: float | None
) -> None:
    write_constants(calibration_file(), DeviceConstants(A100.device, 700 * MIB, ratio, "here"))
    on = ["--gpu", "a100-40gb", "--gpus", "8", "--json"]
    planned = json.loads(run(capsys, "plan", "1b", *on)[1])["as_given"]
    stage, micro = str(planned["zero_stage"]), str(planned["micro_batch_size"])
    arguments = ["estimate-memory", "--spec", "1b", "--zero", stage, "--micro-batch-size", micro, *on]
    estimated = json.loads(run(capsys, *arguments)[1])
    assert planned["peak_bytes"] == estimated["per_gpu"]["total_bytes"]
    assert estimated["fits"]["a100-40gb"] is True


def test_the_gaps_of_the_allocator_are_reserved_once() -> None:
    gpu = gpu_named("a100-40gb")
    constants = DeviceConstants(A100.device, 700 * MIB, 1.3, "here")
    machine = Machine.of(with_constants(gpu, {A100.device: constants}), 8)
    for fit in search(workload(load_spec("1b")), machine).fits:
        tensors = fit.memory.tensor_bytes(fit.memory.peak_phase)
        assert fit.memory.peak.runtime_bytes == constants.beside(tensors) < constants.beside(gpu.memory_bytes)
        assert fit.memory.kept.runtime_bytes == fit.memory.peak.runtime_bytes
