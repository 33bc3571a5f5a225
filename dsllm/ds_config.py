"""The one place that spells DeepSpeed's keys: a spec becomes the JSON that DeepSpeed reads.

Nothing is left to DeepSpeed's defaults and nothing says "auto": a key that dsllm relies on is written out even where
today's default is the same. Names of keys and their meaning: deepspeed.ai/docs/config-json, checked against 0.19.8.
"""

from __future__ import annotations

from typing import Any

from dsllm.plan.batch import BatchPlan, resolve_batch
from dsllm.plan.buckets import (
    gather_bucket_elements,
    live_elements,
    persistence_threshold_elements,
    reduce_bucket_elements,
    sub_group_elements,
)
from dsllm.plan.model_shape import ModelShape
from dsllm.plan.workload import Device, Workload, ZeroSettings, workload
from dsllm.spec.sections import Spec


def build_ds_config(
    spec: Spec,
    world_size: int,
    device: Device = "cuda",
    micro_batch_size: int | None = None,
    shape: ModelShape | None = None,
) -> dict[str, Any]:
    """The DeepSpeed JSON of `spec` on `world_size` ranks.

    `micro_batch_size` (sequences) is needed where the spec says `auto`, `shape` where no formula has the network's
    sizes. Raises UserError where the global batch does not divide.
    """
    batch = resolve_batch(spec.batch, world_size, micro_batch_size)
    run = workload(spec, shape=shape)
    return {
        **_batch_keys(batch),
        **_precision_keys(spec, run),
        "gradient_clipping": spec.optimizer.gradient_clipping,
        "managed_gradient_accumulation": True,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        **_optimizer_keys(spec),
        "zero_optimization": _zero_optimization(run.zero, run.shape, spec.zero.nvme_path, device),
        "checkpoint": {"tag_validation": "Fail", "load_universal": False, "use_node_local_storage": False},
        "steps_per_print": None,
        # On by default, and then each forward and each step waits for the device to be idle (utils/timer.py).
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def _batch_keys(batch: BatchPlan) -> dict[str, int]:
    return {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
    }


def _precision_keys(spec: Spec, run: Workload) -> dict[str, Any]:
    training = spec.training
    return {
        "bf16": {"enabled": training.precision == "bf16", "check_grad_overflow": True},
        "fp16": {
            "enabled": training.precision == "fp16",
            "loss_scale": training.loss_scale,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        # No buffer needs DeepSpeed's care: model/build.py keeps the rotary tables in fp32.
        "data_types": {"grad_accum_dtype": run.accumulation_precision, "keep_in_fp32_modules": []},
        # What each micro-batch's gradients are reduced in before they are added up; at stage 1 in bf16, the sum.
        "communication_data_type": training.precision,
    }


def _optimizer_keys(spec: Spec) -> dict[str, Any]:
    """What DeepSpeed makes AdamW of; Muon is handed to it as an object, which it has not tested (engine/muon.py)."""
    if spec.optimizer.name == "muon":
        return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {
        "optimizer": {"type": "AdamW", "params": _adamw(spec)},
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": True,
    }


def _adamw(spec: Spec) -> dict[str, Any]:
    optimizer = spec.optimizer
    # Offloaded states are stepped on the host by DeepSpeed's CPUAdam; else torch's AdamW does the same as DeepSpeed's
    # FusedAdam, and needs no compiler at the first start.
    offloads = spec.zero.offload_optimizer != "none"
    params: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "betas": list(optimizer.betas),
        "eps": optimizer.epsilon,
        "weight_decay": optimizer.weight_decay,
        "torch_adam": not offloads,
    }
    if not offloads:
        params |= {"fused": True} if optimizer.fused else {"fused": False, "foreach": True}
    return params


def _zero_optimization(zero: ZeroSettings, shape: ModelShape, nvme_path: str | None, device: Device) -> dict[str, Any]:
    if zero.stage == 0:
        return {"stage": 0}
    keys: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": zero.overlaps,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": reduce_bucket_elements(zero, shape),
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
    }
    if zero.stage < 3:
        keys["compute_grad_norm"] = True
        keys["allgather_partitions"] = True
        keys["allgather_bucket_size"] = gather_bucket_elements(zero, shape)
    else:
        keys |= _stage_3_keys(zero, shape)
    return keys | _offload_keys(zero, shape, nvme_path, device)


def _stage_3_keys(zero: ZeroSettings, shape: ModelShape) -> dict[str, Any]:
    live = live_elements(zero, shape)
    return {
        "sub_group_size": sub_group_elements(shape),
        "stage3_prefetch_bucket_size": gather_bucket_elements(zero, shape),
        "stage3_param_persistence_threshold": persistence_threshold_elements(zero, shape),
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "stage3_gather_16bit_weights_on_model_save": False,
    }


def _offload_keys(zero: ZeroSettings, shape: ModelShape, nvme_path: str | None, device: Device) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    pin_memory = device == "cuda"  # speeds up copies to a GPU; on the CPU there are none
    if zero.offload_optimizer != "none":
        keys["offload_optimizer"] = {"device": zero.offload_optimizer, "pin_memory": pin_memory}
        if zero.offload_optimizer == "nvme":
            # parameter, gradient and two moments of a tile (DeepSpeedZeroOffloadOptimizerConfig.buffer_count)
            keys["offload_optimizer"] |= {"nvme_path": nvme_path, "buffer_count": 4}
    if zero.offload_param != "none":
        keys["offload_param"] = {"device": zero.offload_param, "pin_memory": pin_memory}
        if zero.offload_param == "nvme":
            # A buffer holds the largest parameter; five are in flight. DeepSpeed would keep 1e9 elements a rank in host
            # memory, which is all of most models.
            keys["offload_param"] |= {
                "nvme_path": nvme_path,
                "max_in_cpu": 0,
                "buffer_count": 5,
                "buffer_size": max(shape.embedding_parameters, shape.parameters_per_layer),
            }
    return keys
