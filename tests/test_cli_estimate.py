"""estimate-memory: what it prints, what it advises, what it refuses, and what it does not import."""

from __future__ import annotations

import json
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsllm.cli.estimate_report import BAR_WIDTH, bar
from dsllm.plan.calibration import DeviceConstants, write_constants
from dsllm.plan.hardware import gpu_named
from tests.test_cli import run

ROOT = Path(__file__).parent.parent
GIB, MIB = 2**30, 2**20
FP16 = ["--set", "training.precision=fp16"]
BF16_SUMS = ["--set", "training.gradient_accumulation_precision=bf16"]
TERMS = ["parameters", "gradients", "optimizer", "activations", "logits", "communication", "temporaries", "runtime"]


@pytest.fixture(autouse=True)
def _a_machine_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSLLM_DEBUG", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.delenv("DSLLM_HARDWARE", raising=False)


def estimate(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status, out, err = run(capsys, "estimate-memory", *arguments)
    assert (status, err) == (0, "")
    return out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(estimate(capsys, *arguments, "--json"))


# --- the tables -------------------------------------------------------------------------------------------------------


def test_one_stage_is_a_row_and_a_bar_for_each_term(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--spec", "gpt2-124m", "--zero", "2", "--gpus", "4"]
    out = estimate(capsys, *arguments)
    rows = re.findall(r"^ (\w+) +(-|[\d.]+ [KMG]iB) +(\d+)%   ([#.]+)$", re.sub(r" +$", "", out, flags=re.M), re.M)
    assert [name for name, *_ in rows] == TERMS
    document = as_json(capsys, *arguments)
    for name, _, share, drawn in rows:
        exact = document["per_gpu"][f"{name}_bytes"] / document["per_gpu"]["total_bytes"]
        assert int(share) == round(100 * exact)
        assert (len(drawn), drawn.count("#")) == (BAR_WIDTH, round(BAR_WIDTH * exact))


def test_the_peak_its_phase_and_the_other_phases_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--spec", "gpt2-124m", "--zero", "3", "--set", "zero.offload_optimizer=cpu"]
    document, out = as_json(capsys, *arguments), estimate(capsys, *arguments)
    found = re.search(r"^peak ([\d.]+) GiB, in (\w+); (\w+) .*iB, (\w+) .*iB; host memory .*iB in all$", out, re.M)
    assert found
    assert found[1] == f"{document['per_gpu']['total_bytes'] / GIB:.2f}"
    assert found[2] == document["peak_phase"]
    assert {found[2], found[3], found[4]} == {"forward", "backward", "step"}


def test_several_stages_stand_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    out, documents = estimate(capsys, "--spec", "1b", "--gpus", "8"), as_json(capsys, "--spec", "1b", "--gpus", "8")
    cells = next(line for line in out.splitlines() if line.startswith(" peak")).split()
    assert out.splitlines()[2].split()[0] == "GiB"
    assert cells[1:] == [f"{document['per_gpu']['total_bytes'] / GIB:.2f}" for document in documents]
    bars = next(line for line in out.splitlines() if line.strip().startswith("#")).split()
    assert "#" * len(bars[0]) in bars
    assert max(len(line) for line in out.splitlines() if line.startswith(" ")) <= 80


def test_small_runs_are_told_in_mebibytes(capsys: pytest.CaptureFixture[str]) -> None:
    out, documents = estimate(capsys, "--spec", "quickstart"), as_json(capsys, "--spec", "quickstart")
    assert out.splitlines()[2].split()[0] == "MiB"
    cells = next(line for line in out.splitlines() if line.startswith(" peak")).split()
    assert cells[1:] == [f"{document['per_gpu']['total_bytes'] / MIB:.1f}" for document in documents]


def test_the_shape_that_is_assumed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    out = estimate(capsys, "--params", "1e9", "--zero", "3")
    assert "30 layers x 1600, 25 heads, 50,257 tokens (gpt2), a typical shape of that size; " in out
    assert "typical" not in estimate(capsys, "--spec", "1b", "--zero", "3")


@given(st.integers(0, 2**40), st.integers(1, 2**40))
def test_a_bar_is_as_wide_as_any_other(size: int, rest: int) -> None:
    assert len(bar(size, size + rest)) == BAR_WIDTH
    assert bar(0, rest) == "." * BAR_WIDTH
    assert bar(rest, rest) == "#" * BAR_WIDTH


# --- a higher stage that takes more -----------------------------------------------------------------------------------


def test_the_table_says_where_deepspeeds_buffers_make_a_stage_dearer(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--spec", "gpt2-124m", "--micro-batch-size", "32"]
    totals = [document["per_gpu"]["total_bytes"] for document in as_json(capsys, *arguments)]
    assert totals[1] > 1.01 * totals[0]
    note = next(line for line in estimate(capsys, *arguments).splitlines() if line.startswith("note: stage 1 takes "))
    more = re.match(r"note: stage 1 takes ([\d.]+) ([MG])iB more than stage 0 on 1 rank; at its peak, in ", note)
    assert more
    assert float(more[1]) == pytest.approx((totals[1] - totals[0]) / (GIB if more[2] == "G" else MIB), abs=0.01)
    assert "(DeepSpeed's BF16_Optimizer keeps all of them in fp32, beside those of backward)" in note


def test_the_note_stands_where_that_stage_alone_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    out = estimate(capsys, "--spec", "gpt2-124m", "--micro-batch-size", "32", "--zero", "1")
    assert "note: stage 1 takes " in out


def test_nothing_is_noted_where_a_higher_stage_takes_less(capsys: pytest.CaptureFixture[str]) -> None:
    totals = [document["per_gpu"]["total_bytes"] for document in as_json(capsys, "--spec", "1b", "--gpus", "64")]
    assert totals == sorted(totals, reverse=True)
    assert "note:" not in estimate(capsys, "--spec", "1b", "--gpus", "64")


# --- what holds it ----------------------------------------------------------------------------------------------------


def test_the_gpus_that_hold_it_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    document = as_json(capsys, "--spec", "1b", "--zero", "3", "--gpus", "8")
    out = estimate(capsys, "--spec", "1b", "--zero", "3", "--gpus", "8")
    left = dict(re.findall(r"([\w-]+) \(([\d.]+) GiB left\)", out))
    assert set(left) == {name for name, fits in document["fits"].items() if fits}
    memory_bytes = gpu_named("a100-40gb").memory_bytes
    assert left["a100-40gb"] == f"{(memory_bytes - document['per_gpu']['total_bytes']) / GIB:.2f}"


def test_one_gpu_that_does_not_hold_it_says_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--spec", "llama-7b", "--zero", "0", "--gpu", "t4", *FP16]
    out, needed = estimate(capsys, *arguments), as_json(capsys, *arguments)["per_gpu"]["total_bytes"]
    over = (needed - 0.95 * gpu_named("t4").memory_bytes) / GIB
    assert f"does not fit t4-16gb: {over:.2f} GiB more than 95% of its 14.56 GiB" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--spec", "gpt2-124m", "--zero", "2", "--gpu", "t4", "--set", "batch.micro_batch_size=64", *FP16],
        ["--spec", "1b", "--zero", "1", "--gpu", "t4", *FP16],
        ["--spec", "1b", "--zero", "0", "--gpu", "rtx-4090", "--gpus", "2", "--set", "zero.overlap_comm=true"],
        ["--spec", "1b", "--zero", "1", "--gpu", "rtx-4090", "--set", "zero.reduce_bucket_elements=100000000"],
        ["--spec", "1b", "--zero", "0", "--gpu", "rtx-4090", *BF16_SUMS, "--gpus", "2"],
        ["--spec", "llama-7b", "--gpu", "l4"],
        ["--params", "7e9", "--zero", "1", "--gpus", "8", "--gpu", "a100-40gb"],
    ],
    ids=" ".join,
)
def test_what_is_advised_can_be_typed_and_then_fits(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    out = estimate(capsys, *arguments)
    gpu = gpu_named(arguments[arguments.index("--gpu") + 1]).name
    advice = re.findall(rf"to fit {gpu}: (.*) takes ([\d.]+) GiB", out)
    assert advice
    for typed, needed in advice:
        again = _without_repeats([*arguments, *shlex.split(typed)])
        documents = as_json(capsys, *again)
        documents = documents if isinstance(documents, list) else [documents]
        totals = [document["per_gpu"]["total_bytes"] for document in documents if document["fits"][gpu]]
        assert needed in {f"{total / GIB:.2f}" for total in totals}


def _without_repeats(arguments: list[str]) -> list[str]:
    """The options with the last value of each; a stage that is set takes the place of --zero."""
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    if any(value.startswith("zero.stage=") for _, value in pairs):
        pairs = [(name, value) for name, value in pairs if name != "--zero"]
    last = {(name, value.split("=")[0] if name == "--set" else ""): value for name, value in pairs}
    return [word for (name, _), value in last.items() for word in (name, value)]


def test_what_no_option_says_is_named_as_a_field_of_a_spec(capsys: pytest.CaptureFixture[str]) -> None:
    out = estimate(capsys, "--params", "13e9", "--zero", "3", "--gpu", "a100-40gb")
    assert re.search(r"^on 1 GPU, to fit a100-40gb: a spec with zero.offload_optimizer=cpu takes ", out, re.M)


def test_more_gpus_come_with_what_does_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    out = estimate(capsys, "--spec", "llama-7b", "--gpu", "l4")
    assert re.search(r"^to fit l4-24gb: --gpus \d+ takes ", out, re.M)
    assert re.search(r"^on 1 GPU, to fit l4-24gb: --set zero.offload_optimizer=cpu takes .* of host memory$", out, re.M)


def test_what_nothing_holds_is_said_with_the_nearest_miss(capsys: pytest.CaptureFixture[str]) -> None:
    out = estimate(capsys, "--params", "9e12", "--zero", "0", "--gpu", "l4")
    assert re.search(
        r"^to fit l4-24gb: nothing does; the least is --zero 3 .* more than 95% of its 21.95 GiB$", out, re.M
    )


def test_a_gpu_without_the_arithmetic_is_noted_and_holds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    out = estimate(capsys, "--spec", "1b", "--zero", "3", "--gpus", "8", "--gpu", "v100")
    assert "note: v100-32gb has no arithmetic in bf16; set training.precision to fp16 or fp32\n" in out
    assert out.splitlines()[-1].endswith(" on each GPU; cannot run on v100-32gb, which has no arithmetic in bf16")
    of_parameters = estimate(capsys, "--params", "1e9", "--gpu", "v100")
    assert "no arithmetic in bf16; give a spec with training.precision fp16 or fp32\n" in of_parameters
    assert "no arithmetic" not in estimate(capsys, "--spec", "1b", "--gpu", "h100")


def test_gpus_without_the_arithmetic_are_not_among_those_that_hold_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--spec", "1b", "--zero", "3", "--gpus", "8"]
    small = {"t4-16gb", "v100-32gb"}
    fits = as_json(capsys, *arguments)["fits"]
    assert {name for name, holds in fits.items() if not holds} == small
    assert not any(name in estimate(capsys, *arguments) for name in small)
    assert all(as_json(capsys, *arguments, *FP16)["fits"].values())
    assert all(name in estimate(capsys, *arguments, *FP16) for name in small)


def test_advice_is_for_a_gpu_with_the_arithmetic(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("huge-999gb: {memory_gib: 999, flops: {fp16: 1e15}, memory_bytes_per_second: 1e12}\n")
    out = estimate(capsys, "--params", "200e9", "--zero", "0", "--hardware", str(mine))
    assert "does not fit any known GPU, the largest being b200-180gb: " in out
    assert "to fit b200-180gb: " in out
    assert "huge" not in out


def test_on_the_cpu_ranks_share_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--spec", "quickstart", "--zero", "2", "--gpus", "2", "--device", "cpu"]
    out, document = estimate(capsys, *arguments), as_json(capsys, *arguments)
    together = 2 * document["per_gpu"]["total_bytes"] / MIB
    assert re.search(rf"^all ranks on this machine, which has [\d.]+ GiB: stage 2 {together:.2f} MiB$", out, re.M)


def test_an_estimate_for_the_cpu_fits_a_cpu_and_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert as_json(capsys, "--spec", "quickstart", "--zero", "2", "--device", "cpu")["fits"] == {"cpu": True}
    assert as_json(capsys, "--params", "13e9", "--zero", "0", "--device", "cpu")["fits"] == {"cpu": False}


def test_the_cpu_that_is_named_says_what_is_left_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--zero", "0", "--device", "cpu", "--gpu", "cpu"]
    needed = as_json(capsys, "--params", "1e8", *arguments)["per_gpu"]["total_bytes"]
    left = (gpu_named("cpu").memory_bytes - needed) / GIB
    out = estimate(capsys, "--params", "1e8", *arguments)
    assert f"stage 0: {needed / GIB:.2f} GiB on each CPU rank; fits cpu ({left:.2f} GiB left)\n" in out
    assert "on each CPU rank; does not fit cpu: " in estimate(capsys, "--params", "13e9", *arguments)


# --- devices of the user's own ----------------------------------------------------------------------------------------


@pytest.fixture
def own_hardware(tmp_path: Path) -> str:
    """A file with a GPU that the catalogue lacks, and with half of an A100."""
    path = tmp_path / "hardware.yaml"
    path.write_text(
        "l40s-48gb: {memory_gib: 44.5, flops: {bf16: 362e12, fp32: 91.6e12}, memory_bytes_per_second: 864e9}\n"
        "a100-80gb: {memory_gib: 40}\n"
    )
    return str(path)


def test_devices_of_a_file_are_known_by_option_and_by_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_hardware: str
) -> None:
    arguments = ["--spec", "1b", "--zero", "3", "--gpus", "8"]
    assert "l40s-48gb" not in as_json(capsys, *arguments)["fits"]
    by_option = estimate(capsys, *arguments, "--gpu", "l40s", "--hardware", own_hardware)
    assert "; fits l40s-48gb (" in by_option
    assert ", l40s-48gb (" in estimate(capsys, *arguments, "--hardware", own_hardware)
    monkeypatch.setenv("DSLLM_HARDWARE", own_hardware)
    assert estimate(capsys, *arguments, "--gpu", "l40s") == by_option
    assert as_json(capsys, *arguments)["fits"]["l40s-48gb"] is True


def test_config_chooses_the_micro_batch_for_a_gpu_of_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own_hardware: str
) -> None:
    def size(*arguments: str) -> int:
        status, out, err = run(capsys, "config", "gpt2-124m", "--world-size", "2", *arguments)
        assert (status, err) == (0, "")
        return int(json.loads(out)["train_micro_batch_size_per_gpu"])

    whole, half = size(), size("--hardware", own_hardware)
    assert half < size("--gpu", "l40s", "--hardware", own_hardware) <= whole
    monkeypatch.setenv("DSLLM_HARDWARE", own_hardware)
    assert size() == half


def test_config_leaves_room_for_the_runtime_of_the_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = []
    for gib in (1, 70):
        path = tmp_path / f"{gib}.yaml"
        path.write_text(f"a100-80gb: {{runtime_gib: {gib}}}\n")
        _, out, _ = run(capsys, "config", "gpt2-124m", "--world-size", "2", "--hardware", str(path))
        sizes.append(json.loads(out)["train_micro_batch_size_per_gpu"])
    assert sizes[1] < sizes[0]


def test_a_device_of_the_file_counts_with_its_calibration(
    capsys: pytest.CaptureFixture[str], own_hardware: str, tmp_path: Path
) -> None:
    constants = DeviceConstants("NVIDIA L40S-48GB", 600 * MIB, None, "runs/x")
    write_constants(tmp_path / "settings/dsllm/calibration.json", constants)
    arguments = ["--spec", "1b", "--zero", "3", "--gpu", "l40s", "--hardware", own_hardware]
    assert as_json(capsys, *arguments)["per_gpu"]["runtime_bytes"] == 600 * MIB


# --- this machine's own GPUs, by a driver's program of the test -------------------------------------------------------

TWO_A100 = "0, GPU-aa, NVIDIA A100-SXM4-40GB, 40960, 1000, 39000\n1, GPU-bb, NVIDIA A100-SXM4-40GB, 40960, 39000, 1000"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a program that answers as the driver's would."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    return tmp_path / "nvidia-smi"


def answer(program: Path, text: str, status: int = 0) -> None:
    program.write_text(f"#!/bin/sh\ncat <<'end'\n{text}\nend\nexit {status}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def own_lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    out = estimate(capsys, "--spec", "1b", "--gpus", "2", *arguments)
    return [line for line in out.splitlines() if line.startswith("this machine")]


def test_free_memory_of_this_machines_gpus_counts_the_fullest(
    capsys: pytest.CaptureFixture[str], nvidia_smi: Path
) -> None:
    answer(nvidia_smi, TWO_A100)
    (line,) = own_lines(capsys, "--zero", "3")
    assert line.startswith(
        "this machine: 2 x NVIDIA A100-SXM4-40GB, 1000.00 MiB free now on the fullest: does not fit: "
    )


@pytest.mark.parametrize("selected", ["0", "GPU-aa"])
def test_a_selection_of_gpus_is_followed(
    capsys: pytest.CaptureFixture[str], nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch, selected: str
) -> None:
    answer(nvidia_smi, TWO_A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", selected)
    (line,) = own_lines(capsys, "--zero", "3")
    assert re.match(r"this machine: 1 x NVIDIA A100-SXM4-40GB, 38.09 GiB free now: fits, [\d.]+ GiB left$", line)


def test_a_gpu_of_this_machine_without_the_arithmetic_cannot_run_it(
    capsys: pytest.CaptureFixture[str], nvidia_smi: Path
) -> None:
    answer(nvidia_smi, "0, GPU-aa, Tesla V100-SXM2-32GB, 32768, 0, 32768")
    (line,) = own_lines(capsys)
    assert line.endswith(" free now: cannot run it, without arithmetic in bf16")
    assert ": holds stage " in own_lines(capsys, *FP16)[0]


def test_of_several_stages_those_are_named_that_this_machine_holds(
    capsys: pytest.CaptureFixture[str], nvidia_smi: Path
) -> None:
    answer(nvidia_smi, "0, GPU-aa, NVIDIA L4, 23034, 0, 22478")
    documents = as_json(capsys, "--spec", "1b", "--gpus", "2")
    stages = [
        str(document["zero_stage"])
        for document in documents
        if document["per_gpu"]["total_bytes"] <= 0.95 * 22478 * MIB
    ]
    (line,) = own_lines(capsys)
    assert line == f"this machine: 1 x NVIDIA L4, 21.95 GiB free now: holds stage {', '.join(stages)}"


@pytest.mark.parametrize(
    ("text", "status"), [("no devices were found", 6), ("0, GPU-aa, GB10, [N/A], [N/A], [N/A]", 0)]
)
def test_a_driver_that_does_not_tell_is_no_gpu(
    capsys: pytest.CaptureFixture[str], nvidia_smi: Path, text: str, status: int
) -> None:
    answer(nvidia_smi, text, status)
    assert own_lines(capsys) == []


def test_constants_of_this_machines_gpu_are_used_where_none_is_named(
    capsys: pytest.CaptureFixture[str], nvidia_smi: Path, tmp_path: Path
) -> None:
    answer(nvidia_smi, TWO_A100)
    constants = DeviceConstants("NVIDIA A100-SXM4-40GB", 600 * MIB, None, "runs/x")
    write_constants(tmp_path / "settings/dsllm/calibration.json", constants)
    assert as_json(capsys, "--spec", "1b", "--zero", "3")["per_gpu"]["runtime_bytes"] == 600 * MIB
    assert "runtime as measured on NVIDIA A100-SXM4-40GB (runs/x)" in estimate(capsys, "--spec", "1b", "--zero", "3")
    catalogued = as_json(capsys, "--spec", "1b", "--zero", "3", "--gpu", "h100")["per_gpu"]["runtime_bytes"]
    assert catalogued == gpu_named("h100").runtime_bytes


@pytest.mark.parametrize("runtime_bytes", [-5, "1e999"])
def test_a_size_that_cannot_be_is_not_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, runtime_bytes: object
) -> None:
    measured = f'{{"runtime_bytes": {runtime_bytes}, "peak_bytes": {{"step": 100}}, "reserved_bytes": 110}}'
    (tmp_path / "memory.json").write_text(f'{{"device": "NVIDIA H200", "measured": {measured}}}')
    status, out, err = run(capsys, "calibrate", "--from", str(tmp_path))
    assert (status, out) == (2, "")
    assert err.startswith(f"dsllm: {tmp_path}/memory.json: no memory beside tensors was measured there; ")
    assert not (tmp_path / "settings/dsllm/calibration.json").exists()


# --- tracing ----------------------------------------------------------------------------------------------------------


def test_a_trace_stands_beside_the_arithmetic_term_by_term(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="tracing needs torch and transformers")
    arguments = ["--spec", "quickstart", "--zero", "2", "--trace"]
    document, out = as_json(capsys, *arguments), estimate(capsys, *arguments)
    totals = document["per_gpu"]["total_bytes"], document["traced"]["per_gpu"]["total_bytes"]
    assert document["traced"]["per_gpu"].keys() == document["per_gpu"].keys()
    assert f"{totals[0] / totals[1] - 1:+.1%}" == re.search(r"peak at stage 2 .* ([+-][\d.]+%)", out)[1]
    assert re.search(r"activations saved for backward +[\d.]+ MiB +[\d.]+ MiB +[+-][\d.]+%", out)


def test_a_trace_reads_any_network_in_the_place_of_the_specs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="tracing needs torch and transformers")
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.MistralConfig(**sizes, num_key_value_heads=2, vocab_size=512, max_position_embeddings=128)
    config.save_pretrained(tmp_path)
    out = estimate(capsys, "--config", str(tmp_path), "--trace", "--zero", "3")
    assert "2 layers x 64, 4 heads, 512 tokens (mistral); 1 x 128 tokens a forward" in out
    status, _, err = run(capsys, "estimate-memory", "--config", str(tmp_path), "--spec", "quickstart", "--trace")
    assert status == 2
    assert err == "dsllm: --config: given a network that reads at most 128 tokens; lower batch.sequence_length\n"
    shorter = ["--spec", "quickstart", "--set", "batch.sequence_length=64", "--set", "model.max_position_embeddings=64"]
    assert "(mistral); 8 x 64 tokens" in estimate(capsys, "--config", str(tmp_path), *shorter, "--trace")


def test_tracing_without_torch_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    status, _, err = run(capsys, "estimate-memory", "--spec", "1b", "--trace")
    assert status == 2
    assert err == "dsllm: --trace: given on a machine without torch, which traces; pip install 'dsllm[train]'\n"


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "0"], "--params: given '0'; must be a number from 1e4 to 1e13, as 1e9, 350M or 1.3B"),
        (["--params", "-1e9"], "--params: given '-1e9'; must be a number from 1e4 to 1e13, as 1e9, 350M or 1.3B"),
        (
            ["--params", "1e9", "--gpus", "0"],
            "--gpus: given '0'; must be a whole number from 1; give the number of ranks",
        ),
        (
            ["--params", "1e9", "--gpus", "many"],
            "--gpus: given 'many'; must be a whole number from 1; give the number of ranks",
        ),
        (
            ["--spec", "1b", "--micro-batch-size", "-4"],
            "--micro-batch-size: given '-4'; must be a whole number from 1; give the number of sequences",
        ),
        (["--params", "1e9", "--zero", "4"], "--zero: given '4'; must be one of 0, 1, 2, 3"),
        (["--params", "1e9", "--device", "tpu"], "--device: given 'tpu'; must be one of cuda, cpu"),
        (["--params", "1e9", "--gpu", "h10"], "GPU: given 'h10', which is not known; did you mean h100-80gb?"),
        (
            ["--params", "1e9", "--gpu", "cpu"],
            "--gpu: given cpu with --device cuda; it is no such device; change either",
        ),
        (
            ["--spec", "1b", "--set", "model.num_attention_heads=7"],
            "1b: model.num_attention_heads: given 7 with hidden_size 1600; the heads must divide the width; "
            "try num_attention_heads 8, or hidden_size 1603",
        ),
        (
            ["--spec", "1b", "--set", "model.hidden_size=-1600"],
            "1b: model.hidden_size: given -1600; must be a whole number greater than 0",
        ),
        (
            ["--spec", "1b", "--set", "zero.stage=4"],
            "1b: zero.stage: given 4; must be a whole number from 0 to 3",
        ),
        (
            ["--spec", "1b", "--set", "model=null"],
            "1b: model: given null; must be a section whose family is one of gpt2, llama, mistral",
        ),
        (
            ["--spec", "1b", "--gpus", "7"],
            "batch.global_batch_size: given 512; micro_batch_size 8 on 7 ranks takes 56 sequences at a time, which "
            "must divide it; try global_batch_size 504 or 560, or 4 or 8 ranks",
        ),
        (
            ["--spec", "1b", "--micro-batch-size", "1000"],
            "batch.global_batch_size: given 512; micro_batch_size 1000 on 1 rank takes 1000 sequences at a time, which "
            "must divide it; try global_batch_size 1000, or micro_batch_size 256 or 512",
        ),
        (
            ["--spec", "gpt2-124m", "--gpus", "3"],
            "batch.global_batch_size: given 512; micro_batch_size 1 on 3 ranks takes 3 sequences at a time",
        ),
        (["--params", "1e9", "--hardware", "nowhere.yaml"], "nowhere.yaml: cannot be read: "),
        (["--spec", "1b", "--config", "x"], "--config: given without --trace, which alone can read any network"),
        (["--params", "1e9", "--config", "x"], "--config: given with --params; a network has one source"),
        (["--params", "1e9", "--trace"], "--trace: given with --params, for which there is no network; give --spec"),
        (["--trace"], "estimate-memory: give one of --params and --spec"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    status, out, err = run(capsys, "estimate-memory", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"dsllm: {message}")
    assert err.count("\n") == 1


def test_a_spec_without_a_model_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = (ROOT / "dsllm/spec/presets/quickstart.yaml").read_text().splitlines()
    start = lines.index("model:")
    end = next(number for number in range(start + 1, len(lines)) if not lines[number].startswith(" "))
    path = tmp_path / "without.yaml"
    path.write_text("\n".join(lines[:start] + lines[end:]))
    status, _, err = run(capsys, "estimate-memory", "--spec", str(path))
    assert status == 2
    assert err.startswith(f"dsllm: {path}: model: missing; must be a section whose family is one of gpt2")
    assert err.count("\n") == 1


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [[], ["--json"], ["--gpu", "l40s"]], ids=["table", "json", "own hardware"])
def test_a_prediction_from_parameters_imports_neither_torch_nor_pydantic(
    output: list[str], own_hardware: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSLLM_HARDWARE", own_hardware)
    arguments = ["dsllm", "estimate-memory", "--params", "1e9", "--zero", "3", *output]
    program = (
        f"import sys; sys.argv = {arguments!r}\n"
        "from dsllm.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'deepspeed', 'pydantic', 'dsllm.spec.sections'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stderr == "[]\n"
    assert ended.stdout
