"""The script that measures a GPU: what its kernels are for, and that it runs from end to end."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNN": "matmul",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matmul",
    "aten::addmm": "matmul",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>": "norms",
    "_rms_norm_backward_kernel": "norms",
    "liger_cross_entropy_kernel": "loss",
    "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>": "optimizer",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL": "communication",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "triton_poi_fused_add_gelu_3": "compiled",
    "triton_poi_fused__to_copy_mul_silu_2": "compiled",
    "triton_per_fused__to_copy_add_native_layer_norm_0": "compiled",
    "triton_red_fused__to_copy_mul_sum_5": "compiled",
    "_triton_rope": "elementwise",
    "element_mul_kernel": "loss",
    "splitKreduce_kernel": "matmul",
    "aten::_to_copy": "copies",
    "something_new": "other",
}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(("kernel", "group"), KERNELS.items())
def test_a_kernel_is_counted_where_its_name_says(kernel: str, group: str) -> None:
    from kernel_groups import group_of

    assert group_of(kernel) == group


def test_seconds_of_a_group_add_up_and_the_longest_comes_first() -> None:
    from kernel_groups import grouped_seconds

    found = grouped_seconds({"aten::mm": 1.0, "Memset (Device)": 2.5, "cutlass_80": 1.0})
    assert list(found.items()) == [("copies", 2.5), ("matmul", 2.0)]


@pytest.mark.slow  # three starts of DeepSpeed
@pytest.mark.timeout(600)
def test_the_script_runs_from_end_to_end_and_leaves_no_results_of_a_cpu() -> None:
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    cases = ["everything on", "loss plain", "Hugging Face Trainer"]
    command = [sys.executable, "benchmarks/throughput.py", "--preset", "quickstart", "--device", "cpu", "--steps", "7"]
    command += [part for case in cases for part in ("--case", case)]
    command += ["--profile", "--set", "training.compile=false", "--set", "batch.sequence_length=32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for case in cases:
        line = next(line for line in ended.stdout.splitlines() if line.startswith(f"quickstart, {case}:"))
        assert "tokens/s" in line
    assert "times the Hugging Face Trainer" in ended.stdout
    assert "by kernel:" in ended.stdout
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").glob("*.json")} == before


def test_a_case_that_takes_too_long_is_stopped_with_its_ranks(tmp_path: Path) -> None:
    from measure import start_ranks

    from dsllm.errors import DsllmError

    script = tmp_path / "sleeps.py"
    script.write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(DsllmError, match="was stopped after 6 s"):
        start_ranks(str(script), [], 1, tmp_path / "log", "cpu", 6)
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(script) in command]


LOG = """[2026-01-01 00:00:00,000] [INFO] [launch.py:147:main] WORLD INFO DICT: {'localhost': [0]}
[rank0]: Traceback (most recent call last):
[rank0]:   File "benchmarks/throughput_ranks.py", line 60, in take
[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
[2026-01-01 00:00:09,000] [INFO] [launch.py:337:sigkill_handler] Killing subprocess 4711
[2026-01-01 00:00:09,000] [ERROR] [launch.py:343:sigkill_handler] ['python', '-Error:'] exits with return code = 1
"""


def test_a_case_that_fails_says_why_in_the_words_of_its_rank_and_not_of_the_launcher(tmp_path: Path) -> None:
    from throughput import reason

    from dsllm.errors import DsllmError

    log = tmp_path / "log"
    log.write_text(LOG)
    failed = DsllmError(f"script.py exited with 1; the end of its log:\n{LOG}")
    assert reason(failed, log) == "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    log.write_text("Killed\n")
    assert reason(failed, log) == f"script.py exited with 1; the end of its log: {log}"
    assert reason(DsllmError("script.py was stopped after 6 s"), log) == "script.py was stopped after 6 s"


def test_the_trainer_is_given_adamw_where_the_engine_has_muon(tmp_path: Path) -> None:
    from throughput import TRAINER, overrides_of, trainer_arguments

    from dsllm.spec.load import load_spec

    given = ["optimizer.name=muon", "optimizer.muon_learning_rate=0.01"]
    args = argparse.Namespace(steps=7, device="cpu", micro_batch_size=None, set=given)
    spec = load_spec("quickstart", overrides_of("quickstart", TRAINER, args, 1))
    trainer_arguments(spec, args, 1, tmp_path / "case")
    assert json.loads((tmp_path / "case.ds.json").read_text())["optimizer"]["type"] == "AdamW"


def test_a_profile_without_the_case_that_it_is_of_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from throughput import parse_arguments

    monkeypatch.setattr(sys, "argv", ["throughput.py", "--profile", "--case", "Muon"])
    with pytest.raises(SystemExit, match="2"):
        parse_arguments()
    assert "--profile is of the case 'everything on', which --case leaves out" in capsys.readouterr().err


@pytest.mark.skipif("torch" in sys.modules and sys.modules["torch"].cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_and_what_to_do() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    command = [sys.executable, "benchmarks/throughput.py"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout.strip()) == (
        2,
        "throughput: no CUDA GPU here; run it where there is one, or with --device cpu",
    )
