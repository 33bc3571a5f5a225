"""`dsllm plan`: what it prints, for people and for scripts, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dsllm.cli.app import main
from dsllm.cli.hardware import HARDWARE_VARIABLE
from dsllm.cli.plan import rank_counts
from dsllm.errors import UserError
from dsllm.spec.load import dump_spec, load_spec

A100 = ["--gpu", "a100-40gb", "--gpus", "8"]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSLLM_DEBUG", "")
    monkeypatch.delenv(HARDWARE_VARIABLE, raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `dsllm plan`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dsllm", "plan", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    status, out, err = run(capsys, *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


# --- one machine ------------------------------------------------------------------------------------------------------


def test_the_example_of_the_design_says_what_is_trained_how_and_for_how_much(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = run(capsys, "1b", *A100, "--price-per-hour", "8.80")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0].startswith("1.1B parameters on 20.0B tokens, 0.94 times the compute-optimal 21.3B; 38,147 steps")
    assert lines[0].endswith("petaFLOP/s-days")
    assert lines[1] == "8 x a100-40gb, $8.80 an hour"
    assert any(line.startswith(" as the spec says      2            full") for line in lines)
    assert any(line.startswith("disk: 13.90 GiB a checkpoint, 41.69 GiB for 3") for line in lines)
    assert lines[-1].startswith("take")
    assert "--set" in lines[-1]


def test_json_keeps_bytes_and_seconds_whole(capsys: pytest.CaptureFixture[str]) -> None:
    document = planned(capsys, "1b", *A100, "--price-per-hour", "8.80")
    assert (document["parameters"], document["tokens"]) == (1_065_758_400, 38_147 * 524_288)
    assert document["compute_optimal_tokens"] == 20 * 1_065_758_400
    assert document["machine"] == {"gpu": "a100-40gb", "gpus": 8, "nodes": 1}
    assert (document["as_given"]["zero_stage"], document["as_given"]["micro_batch_size"]) == (2, 8)
    rates = [fit["tokens_per_second"] for fit in document["fits"]]
    assert rates == sorted(rates, reverse=True)
    for fit in document["fits"]:
        whole = ("peak_bytes", "host_bytes", "checkpoint_bytes", "step_microseconds", "run_seconds")
        assert all(isinstance(fit[name], int) for name in whole)
        assert fit["dollars"] == pytest.approx(8.80 * fit["run_seconds"] / 3600, rel=1e-3)
        assert sum(fit["step_terms_microseconds"].values()) == pytest.approx(fit["step_microseconds"], abs=5)


def test_the_settings_that_are_recommended_lead_to_what_they_promise(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "1b", *A100)
    flags = out.splitlines()[-1].partition(": ")[2].split()
    promised = planned(capsys, "1b", *A100)["fits"][0]["tokens_per_second"]
    again = planned(capsys, "1b", *A100, *flags)["as_given"]["tokens_per_second"]
    assert again == pytest.approx(promised, rel=0.03)


@pytest.mark.parametrize(
    ("preset", "override"),
    [
        ("1b", "zero.reduce_bucket_elements=100000000"),
        ("gpt2-124m", "training.gradient_accumulation_precision=fp32"),
    ],
)
def test_every_way_that_is_listed_is_a_valid_spec(
    capsys: pytest.CaptureFixture[str], preset: str, override: str
) -> None:
    for fit in planned(capsys, preset, *A100, "--set", override)["fits"]:
        load_spec(preset, [override, *(f"{name}={value}" for name, value in fit["set"].items())])


def test_what_does_not_fit_is_told_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "llama-7b", "--gpu", "a10g", "--gpus", "1")
    assert status == 0
    assert "as the spec says (stage 3, checkpointing full): does not fit: " in out
    assert "does not fit:\n  stage" in out
    assert "GiB more than fits" in out


def test_where_nothing_fits_the_way_out_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "gpt2-124m", "--gpu", "v100", "--gpus", "8")
    assert status == 0
    assert "\n  any of the 24 ways: bf16 is not in the hardware of v100-32gb\n" in out
    last = out.splitlines()[-1]
    assert last == (
        "nothing fits; take a GPU that has bf16, or another precision, of which v100-32gb has fp16 and fp32: "
        "--set training.precision=fp16"
    )
    flags = last.partition(": ")[2].split()
    assert planned(capsys, "gpt2-124m", "--gpu", "v100", "--gpus", "8", *flags)["fits"]
    _, out, _ = run(capsys, "--params", "100B", "--gpu", "a10g", "--gpus", "1")
    assert out.splitlines()[-1].startswith("nothing fits; take more or larger GPUs")


def test_another_precision_takes_the_type_of_the_gradients_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--set", "training.gradient_accumulation_precision=bf16"]
    _, out, _ = run(capsys, "gpt2-124m", "--gpu", "v100", "--gpus", "8", *told)
    flags = out.splitlines()[-1].partition(": ")[2].split()
    assert flags[-1] == "training.gradient_accumulation_precision=auto"
    assert planned(capsys, "gpt2-124m", "--gpu", "v100", "--gpus", "8", *told, *flags)["fits"]


def test_a_plan_without_a_spec_asks_for_one_with_another_precision(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--params", "350M", "--gpu", "v100", "--gpus", "8")
    assert out.splitlines()[-1].endswith("v100-32gb has fp16 and fp32: training.precision of a SPEC")


def test_overrides_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    eager = planned(capsys, "gpt2-124m", *A100)
    compiled = planned(capsys, "gpt2-124m", *A100, "--set", "training.compile=true", "--set", "training.loss=fused")
    assert compiled["fits"][0]["tokens_per_second"] > 1.2 * eager["fits"][0]["tokens_per_second"]


def test_parameters_alone_are_planned_as_a_typical_run(capsys: pytest.CaptureFixture[str]) -> None:
    document = planned(capsys, "--params", "350M", *A100)
    assert document["as_given"] is None
    assert document["parameters"] == pytest.approx(350e6, rel=0.15)
    assert document["tokens"] == pytest.approx(document["compute_optimal_tokens"], rel=0.01)


def test_nodes_are_as_large_as_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    four = planned(capsys, "1b", *A100, "--gpus-per-node", "4")
    eight = planned(capsys, "1b", *A100)
    assert (four["machine"]["nodes"], eight["machine"]["nodes"]) == (2, 1)
    assert four["as_given"]["step_microseconds"] > eight["as_given"]["step_microseconds"]


# --- several machines -------------------------------------------------------------------------------------------------


def test_without_a_gpu_all_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "gpt2-124m")
    assert status == 0
    assert " 8 x h100-80gb " in out
    assert " 8 x cpu " not in out
    assert "  8 x t4-16gb, v100-32gb: bf16" not in out  # each names its own hardware
    assert "8 x t4-16gb: bf16 is not in the hardware of t4-16gb" in out


def test_a_range_of_gpus_takes_longer_with_fewer(capsys: pytest.CaptureFixture[str]) -> None:
    document = planned(capsys, "llama-7b", "--gpu", "h100-80gb", "--gpus", "1-4096")
    counts = [fit["machine"]["gpus"] for fit in document["fits"]]
    seconds = [fit["run_seconds"] for fit in document["fits"]]
    assert counts == [2**power for power in range(len(counts))]
    assert seconds == sorted(seconds, reverse=True)
    assert document["misfits"][-1]["machine"]["gpus"] == 4096
    assert document["misfits"][-1]["reason"] == "2048 sequences do not divide over 4096 ranks"


def test_a_deadline_answers_with_the_cheapest_machine(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "gpt2-124m", "--deadline-hours", "3")
    assert out.splitlines()[-1].startswith("cheapest within the deadline: ")
    document = planned(capsys, "gpt2-124m", "--deadline-hours", "3")
    dollars = [fit["dollars"] for fit in document["fits"]]
    assert dollars == sorted(dollars)
    assert max(fit["run_seconds"] for fit in document["fits"]) <= 3 * 3600


def test_a_deadline_that_the_fastest_way_keeps_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    on = ["--gpu", "l4", "--gpus", "8"]
    fastest = planned(capsys, "gpt2-124m", *on)["fits"][0]
    hours = (fastest["run_seconds"] + 60) / 3600
    kept = planned(capsys, "gpt2-124m", *on, "--deadline-hours", f"{hours}")["fits"]
    assert [fit["run_seconds"] for fit in kept] == [fastest["run_seconds"]]


def test_a_budget_answers_with_the_fastest_machine(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "gpt2-124m", "--budget-dollars", "60", "--gpus", "8")
    assert out.splitlines()[-1].startswith("fastest within the budget: 8 x ")


def test_a_budget_that_nothing_fits_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "llama-7b", "--gpu", "h100-80gb", "--gpus", "64", "--budget-dollars", "100")
    assert (status, out) == (2, "")
    assert err.startswith(
        "dsllm: plan: given --budget-dollars 100, which nothing keeps; closest is 64 x h100-80gb with "
    )
    assert " over the budget; raise the limit, or train on fewer tokens" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "counts"),
    [("8", [8]), ("8,16,64", [8, 16, 64]), ("1-8", [1, 2, 4, 8]), ("3-20", [4, 8, 16]), ("6,1-4", [1, 2, 4, 6])],
)
def test_numbers_of_gpus_are_a_list_or_a_range(text: str, counts: list[int]) -> None:
    assert rank_counts(text) == counts


@pytest.mark.parametrize("text", ["0", "-1", "many", "8-4", "5-7", "", "1e3", "8,,16"])
def test_other_numbers_of_gpus_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--gpus: given '{text}'; must be a number from 1, a list as 8,16, or a range"):
        rank_counts(text)


# --- hardware of one's own --------------------------------------------------------------------------------------------


def test_a_hardware_file_is_taken_from_the_option_or_the_environment(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("a100-40gb: {price_per_hour: 1.10}\n")
    _, out, _ = run(capsys, "1b", *A100, "--hardware", str(mine))
    assert "8 x a100-40gb, $8.80 an hour" in out
    monkeypatch.setenv(HARDWARE_VARIABLE, str(mine))
    _, out, _ = run(capsys, "1b", *A100)
    assert "8 x a100-40gb, $8.80 an hour" in out


# --- calibration ------------------------------------------------------------------------------------------------------


def run_folder(path: Path, device: str | None, step_seconds: float = 4.0) -> Path:
    """The files of a run of preset 1b on 8 ranks, of which each step took as long."""
    path.mkdir()
    (path / "spec.yaml").write_text(dump_spec(load_spec("1b")))
    passport = {"world_size": 8} | ({"device": device} if device else {})
    (path / "passport.json").write_text(json.dumps(passport))
    (path / "ds_config.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 8}))
    steps = [
        {"step": step, "loss": 3.0, "step_seconds": step_seconds + (20.0 if step < 6 else 0)} for step in range(1, 21)
    ]
    lines = [json.dumps(step) for step in steps]
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 21, "step_sec')  # killed while it wrote
    return path


def test_a_measured_run_takes_the_place_of_assumptions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "x", "NVIDIA A100-SXM4-40GB")
    document = planned(capsys, "1b", *A100, "--calibrate-from", str(folder))
    assert document["as_given"]["step_microseconds"] == 4_000_000
    assert document["calibration"]["machine"] == {"gpu": "a100-40gb", "gpus": 8, "nodes": 1}
    assert (document["calibration"]["measured_microseconds"], document["calibration"]["steps"]) == (4_000_000, 15)
    _, out, _ = run(capsys, "1b", *A100, "--calibrate-from", str(folder))
    assert "calibrated: 4 s a step measured on 8 x a100-40gb over 15 steps, " in out


def test_a_run_without_a_device_is_measured_on_the_gpu_that_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = run_folder(tmp_path / "x", None)
    document = planned(capsys, "1b", *A100, "--calibrate-from", str(folder))
    assert document["calibration"]["machine"]["gpu"] == "a100-40gb"
    status, _, err = run(capsys, "1b", "--gpus", "8", "--calibrate-from", str(folder))
    assert status == 2
    assert "ran on a device that its passport does not name, which is not in the catalogue; name its like" in err


def test_a_folder_that_is_no_run_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, "1b", *A100, "--calibrate-from", str(tmp_path))
    assert (status, out) == (2, "")
    assert err == (
        f"dsllm: --calibrate-from: {tmp_path}/metrics.jsonl: No such file or directory; give a run folder, as "
        "runs/quickstart\n"
    )


def test_a_run_folder_that_lacks_an_entry_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "x", "NVIDIA A100-SXM4-40GB")
    (folder / "ds_config.json").write_text("{}")
    _, _, err = run(capsys, "1b", *A100, "--calibrate-from", str(folder))
    assert "ds_config.json: train_micro_batch_size_per_gpu: missing; must be a whole number from 1; give a fold" in err
    (folder / "passport.json").write_text("{")
    _, _, err = run(capsys, "1b", *A100, "--calibrate-from", str(folder))
    assert "passport.json: not valid JSON" in err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", "\x00garbage\n", "line 1 is not the record of a step; remove it, or give another run"),
        ("metrics.jsonl", "{}\n[1]\n", "line 2 is not the record of a step; remove it, or give another run"),
        ("metrics.jsonl", '{"step": 1}\n' * 20, "step 1: step_seconds: given None; a step takes time; remove its line"),
        ("passport.json", "[]", "holds no entries; give a folder that dsllm trained in"),
        ("passport.json", "{}", "world_size: missing; must be a whole number from 1; give a folder"),
        ("passport.json", '{"world_size": "8"}', "world_size: given '8'; must be a whole number from 1; give a folder"),
        ("passport.json", '{"world_size": 0}', "world_size: given 0; must be a whole number from 1; give a folder"),
        ("passport.json", '{"world_size": 3, "device": "NVIDIA L4"}', "micro_batch_size 8 on 3 ranks takes 24"),
        ("passport.json", '{"world_size": 8, "device": ["a"]}', "which is not in the catalogue; name its like"),
        ("passport.json", '{"world_size": 8, "device": "Tesla T4"}', "a run in bf16 on t4-16gb, which has no such"),
        ("ds_config.json", '{"train_micro_batch_size_per_gpu": "auto"}', "given 'auto'; must be a whole number from 1"),
    ],
)
def test_a_damaged_run_folder_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, text: str, message: str
) -> None:
    folder = run_folder(tmp_path / "x", "NVIDIA A100-SXM4-40GB")
    (folder / name).write_text(text)
    status, out, err = run(capsys, "1b", "--gpus", "8", "--calibrate-from", str(folder))
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_measured_run_was_on_nodes_as_large_as_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "x", "NVIDIA A100-SXM4-40GB")
    document = planned(capsys, "1b", *A100, "--gpus-per-node", "4", "--calibrate-from", str(folder))
    assert document["calibration"]["machine"]["nodes"] == document["machine"]["nodes"] == 2
    assert document["as_given"]["step_microseconds"] == 4_000_000


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan: give one of SPEC and --params"),
        (["1b", "--params", "1e9"], "plan: give one of SPEC and --params"),
        (["--params", "-3"], "--params: given '-3'; must be a number from 1e4 to 1e13"),
        (["--params", "1e9", "--set", "seed=1"], "--set: nothing to override without SPEC"),
        (["1b", "--gpu", "h10"], "GPU: given 'h10', which is not known; did you mean h100-80gb"),
        (["1b", "--gpu", "a100"], "GPU: given 'a100'; must be one of a100-40gb, a100-80gb"),
        (["1b", "--gpus", "0"], "--gpus: given '0'; must be a number from 1"),
        (["1b", *A100[:2], "--gpus", "3"], "batch.global_batch_size: given 512; micro_batch_size 1 on 3 ranks takes 3"),
        (["1b", "--budget-dollars", "0"], "--budget-dollars: given '0'; must be a number above 0"),
        (["1b", "--deadline-hours", "-1"], "--deadline-hours: given '-1'; must be a number above 0"),
        (["1b", "--price-per-hour", "nan"], "--price-per-hour: given 'nan'; must be a number above 0"),
        (["1b", "--price-per-hour", "much"], "--price-per-hour: given 'much'; must be a number above 0; for example"),
        (["1b", "--gpus-per-node", "0"], "--gpus-per-node: given '0'; must be a whole number from 1"),
        (["1b", "--gpu", ""], "GPU: given '', which is not known; must be one of t4-16gb"),
        (["1b", "--gpus", ""], "--gpus: given ''; must be a number from 1"),
        (["1b", "--gpus-per-node", ""], "--gpus-per-node: given ''; must be a whole number from 1"),
        (["1b", "--hardware", ""], ".: cannot be read"),
        (["1b", "--calibrate-from", ""], "--calibrate-from: metrics.jsonl: No such file or directory"),
        (["1b", "--hardware", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["nothing"], "nothing: there is no such file, and no preset of that name"),
        (["1b", "--set", "model.num_layers=0"], "1b: model.num_layers: given 0"),
        (["1b", "--set", "zero.stage=4"], "1b: zero.stage: given 4"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"dsllm: {message}")
    assert err.count("\n") == 1
