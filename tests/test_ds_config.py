"""DeepSpeed takes every JSON that is made of a valid spec, and a spec that it would refuse or misread is none."""

from __future__ import annotations

import inspect
import itertools
import json
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsllm.ds_config import build_ds_config
from dsllm.errors import SpecError
from dsllm.plan.model_shape import model_shape
from dsllm.spec.load import load_spec, parse_spec
from dsllm.spec.sections import Spec
from tests.spec_strategies import specs

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
WORLD_SIZES = (1, 2, 8)
AXES: dict[str, tuple[Any, ...]] = {
    "stage": (0, 1, 2, 3),
    "offload_optimizer": ("none", "cpu", "nvme"),
    "offload_param": ("none", "cpu", "nvme"),
    "overlap_comm": ("auto", True, False),
    "precision": ("bf16", "fp16", "fp32"),
    "gradient_accumulation_precision": ("auto", "fp32", "bf16", "fp16"),
    "loss_scale": (0.0, 128.0),
}
COMBINATIONS = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def document_of(combination: dict[str, Any]) -> dict[str, Any]:
    zero_fields = ("stage", "offload_optimizer", "offload_param", "overlap_comm")
    zero = {field: combination[field] for field in zero_fields}
    if "nvme" in (zero["offload_optimizer"], zero["offload_param"]):
        zero["nvme_path"] = "/mnt/nvme"
    return {
        "name": "every-combination",
        "model": {"family": "gpt2", "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4},
        "tokenizer": {"kind": "bpe", "vocab_size": 1000},
        "data": {"sources": [{"kind": "python-stdlib"}]},
        "batch": {"sequence_length": 128, "global_batch_size": 16, "micro_batch_size": 2},
        "training": {
            "train_steps": 10,
            **{field: value for field, value in combination.items() if field not in zero_fields},
        },
        "zero": zero,
    }


def is_sound(combination: dict[str, Any]) -> bool:
    """Whether DeepSpeed 0.19.8 does what the combination says: read in its source, independently of the rules."""
    stage, precision = combination["stage"], combination["precision"]
    accumulation = combination["gradient_accumulation_precision"]
    if accumulation not in ("auto", "fp32", precision):
        return False  # nothing adds bf16 gradients up in fp16, or fp32 ones in less
    if stage == 0 and accumulation not in ("auto", precision):
        return False  # runtime/engine.py, _do_optimizer_sanity_check: NotImplementedError
    if combination["loss_scale"] and precision != "fp16":
        return False  # runtime/engine.py, loss_scale: 1 unless fp16 is enabled
    if combination["offload_optimizer"] != "none" and stage == 0:
        return False  # runtime/engine.py hands the block to ZeRO optimizers alone
    if combination["offload_optimizer"] == "nvme" and stage < 3:
        return False  # runtime/zero/stage_1_and_2.py takes any device but "none" for the CPU
    if combination["offload_param"] != "none" and stage < 3:
        return False  # read by stage 3 alone
    if combination["overlap_comm"] is True:
        # BF16_Optimizer reduces after backward: runtime/engine.py, _configure_bf16_optimizer takes no overlap_comm
        runs_bf16_optimizer = stage == 1 and precision == "bf16" and combination["offload_optimizer"] == "none"
        return stage > 0 and not (runs_bf16_optimizer and accumulation in ("auto", "fp32"))
    return True


SOUND = [combination for combination in COMBINATIONS if is_sound(combination)]


def test_a_combination_that_deepspeed_would_refuse_or_ignore_is_refused_and_no_other() -> None:
    for combination in COMBINATIONS:
        try:
            parse_spec(document_of(combination))
        except SpecError:
            assert not is_sound(combination), f"refused without need: {combination}"
        else:
            assert is_sound(combination), f"admitted: {combination}"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_deepspeed_reads_out_of_every_sound_combination_what_the_spec_says(world_size: int, device: str) -> None:
    with ranks_of(world_size) as read_config:
        for combination in SOUND:
            spec = parse_spec(document_of(combination))
            config = read_config(build_ds_config(spec, world_size, device))  # raises what DeepSpeed refuses
            read = {
                "stage": config.zero_optimization_stage,
                "offload_optimizer": device_of(config.zero_config.offload_optimizer),
                "offload_param": device_of(config.zero_config.offload_param),
                "loss_scale": config.float16_config.loss_scale,
                "bf16": config.bfloat16_config.enabled,
                "fp16": config.float16_config.enabled,
            }
            assert read == {
                **{field: combination[field] for field in ("stage", "offload_optimizer", "offload_param")},
                "loss_scale": combination["loss_scale"],
                "bf16": combination["precision"] == "bf16",
                "fp16": combination["precision"] == "fp16",
            }, combination
            if combination["overlap_comm"] != "auto" and combination["stage"]:
                assert config.zero_config.overlap_comm is combination["overlap_comm"]
            assert config.gradient_accumulation_steps * config.train_micro_batch_size_per_gpu * world_size == 16


@given(specs, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_deepspeed_takes_the_json_of_any_spec(spec: Spec, micro_batch_size: int) -> None:
    batch = spec.batch.model_copy(update={"micro_batch_size": 1, "global_batch_size": micro_batch_size})
    with ranks_of(1) as read_config:
        config = build_ds_config(spec.model_copy(update={"batch": batch}), 1)
        assert says_nothing_automatic(config)
        read_config(json.loads(json.dumps(config)))


def test_buckets_never_exceed_the_model() -> None:
    overrides = ["zero={stage: 3, offload_optimizer: nvme, offload_param: nvme, nvme_path: /mnt/nvme}"]
    for name, stage in itertools.product(("quickstart", "gpt2-124m", "llama-7b"), (1, 2, 3)):
        spec = load_spec(name, overrides if stage == 3 else [f"zero.stage={stage}"])
        zero = build_ds_config(spec, 1, micro_batch_size=1)["zero_optimization"]
        sizes = {key: value for key, value in {**zero, **zero.get("offload_param", {})}.items() if is_a_size(key)}
        assert len(sizes) == {1: 2, 2: 2, 3: 7}[stage]
        parameters = model_shape(spec).allocated_parameters
        assert all(0 < size <= parameters for size in sizes.values()), sizes


def test_bucket_sizes_that_the_spec_gives_are_taken_as_they_are() -> None:
    given_sizes = ["zero.reduce_bucket_elements=1000", "zero.gather_bucket_elements=2000"]
    zero = build_ds_config(load_spec("quickstart", given_sizes), 1)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (1000, 2000)
    at_stage_3 = ["zero.stage=3", *given_sizes, "zero.max_live_elements=4000", "zero.persistence_threshold_elements=0"]
    zero = build_ds_config(load_spec("quickstart", at_stage_3), 1)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (1000, 2000)
    assert (zero["stage3_max_live_parameters"], zero["stage3_param_persistence_threshold"]) == (4000, 0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_looks_at_every_key_that_is_written(stage: int) -> None:
    # It takes unknown keys at the top level, in "checkpoint" and in "data_types" without a word.
    config = build_ds_config(load_spec("quickstart", [f"zero.stage={stage}"]), 1)
    config |= {block: RecordingDict(config[block]) for block in ("checkpoint", "data_types")}
    config = RecordingDict(config)
    with ranks_of(1) as read_config:
        read_config(config)
    for block in (config, config["checkpoint"], config["data_types"]):
        assert block.keys() <= block.looked_up


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_optimizer_takes_every_parameter_that_is_written(offload: str) -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from torch.optim import AdamW

    config = build_ds_config(load_spec("quickstart", [f"zero.offload_optimizer={offload}"]), 1)
    params = config["optimizer"]["params"]
    is_torch = params.pop("torch_adam")  # runtime/engine.py, get_optimizer_configuration, takes it out too
    assert is_torch is (offload == "none")
    inspect.signature(AdamW if is_torch else DeepSpeedCPUAdam).bind([], **params)


def test_host_memory_is_pinned_for_a_gpu_only() -> None:
    spec = load_spec("1b", ["zero={stage: 3, offload_optimizer: cpu, offload_param: cpu}"])
    for device, pinned in (("cuda", True), ("cpu", False)):
        zero = build_ds_config(spec, 8, device)["zero_optimization"]
        assert zero["offload_optimizer"]["pin_memory"] is zero["offload_param"]["pin_memory"] is pinned


def test_parameters_offloaded_to_nvme_do_not_stay_in_host_memory() -> None:
    spec = load_spec("1b", ["zero={stage: 3, offload_param: nvme, nvme_path: /mnt/nvme}"])
    assert build_ds_config(spec, 8)["zero_optimization"]["offload_param"]["max_in_cpu"] == 0


def test_the_examples_in_ds_configs_are_current() -> None:
    expected = runpy.run_path(str(DS_CONFIGS / "generate.py"))["example_files"]()
    found = {path.name: path.read_text() for path in DS_CONFIGS.iterdir() if path.suffix in (".json", ".yaml")}
    assert found == expected, "run python ds_configs/generate.py"


def test_every_example_loads_says_nothing_automatic_and_is_in_the_readme() -> None:
    readme = (DS_CONFIGS / "README.md").read_text()
    for path in DS_CONFIGS.glob("*.json"):
        config = json.loads(path.read_text())
        assert says_nothing_automatic(config)
        assert config == build_ds_config(load_spec(str(path.with_suffix(".yaml"))), 8)
        assert f"({path.name})" in readme
        assert f"({path.with_suffix('.yaml').name})" in readme
    assert len(list(DS_CONFIGS.glob("*.json"))) == 7


class RecordingDict(dict):
    """A dict that knows which keys were asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.looked_up: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_up.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.looked_up.add(key)
        return super().__getitem__(key)

    def __copy__(self) -> RecordingDict:
        return self  # DeepSpeed reads a shallow copy


@contextmanager
def ranks_of(world_size: int) -> Iterator[Any]:
    """DeepSpeed's own reader of configurations, in a world of `world_size` ranks that need no processes."""
    import deepspeed
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig
    from torch.testing._internal.distributed.fake_pg import FakeStore

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as engine/ranks.py does: nothing is compiled
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False)
    try:
        yield DeepSpeedConfig
    finally:
        torch.distributed.destroy_process_group()
        deepspeed.comm.comm.cdb = None


def device_of(offload: Any) -> str:
    return "none" if offload is None else str(offload.device)


def is_a_size(key: str) -> bool:
    return key.endswith(("bucket_size", "buffer_size", "group_size", "live_parameters", "reuse_distance", "threshold"))


def says_nothing_automatic(value: Any) -> bool:
    if isinstance(value, dict):
        return all(says_nothing_automatic(inner) for inner in value.values())
    return value != "auto"
