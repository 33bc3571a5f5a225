"""What this device holds beside a run's tensors, measured with a few steps of a small run for `dsllm calibrate`.

python -m dsllm.engine.calibrate OUTPUT

OUTPUT gets the constants as JSON, or, with an exit status, the reason why there are none. A process of its own: nothing
else is resident in it, and what DeepSpeed has to say does not get between the results.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from dsllm.ds_config import build_ds_config
from dsllm.engine import ranks
from dsllm.engine.allocators import allocator
from dsllm.engine.start import start_engine
from dsllm.errors import DsllmError, UserError
from dsllm.launch.devices import local_gpus
from dsllm.plan.calibration import DeviceConstants, reserved_ratio
from dsllm.plan.hardware import CPU
from dsllm.plan.memory import estimate_memory
from dsllm.plan.workload import workload
from dsllm.spec.load import load_spec
from dsllm.spec.sections import Spec
from dsllm.units import format_bytes

STEPS = 3
"""The optimizer makes some of its states, and libraries their workspaces, in the first."""
SOURCE = "dsllm calibrate"

TINY = ("quickstart", ("model.num_layers=2", "model.hidden_size=48", "batch.micro_batch_size=1"))
"""On the CPU only the libraries are asked about: tensors that hardly count."""
GPU_RUNS = (
    ("gpt2-124m", ("batch.micro_batch_size=16", "batch.global_batch_size=32")),
    ("gpt2-124m", ("batch.micro_batch_size=2", "batch.global_batch_size=4")),
    ("quickstart", ()),
)
"""The larger the run, the less single blocks of the allocator weigh, and the more its rounding is that of real runs."""


def main() -> None:
    output = Path(sys.argv[1])
    try:
        output.write_text(json.dumps(asdict(measure_device())))
    except DsllmError as error:
        output.write_text(str(error))  # on stderr, what libraries say at the end would come after it
        sys.exit(error.exit_code)


def measure_device() -> DeviceConstants:
    """The constants of the first GPU that may be used, or of the CPU. Raises UserError where no run fits the GPU."""
    if ranks.device_type() == "cuda":
        used_before_bytes = _used_bytes()  # first of all: CUDA's context in this process is part of the answer
        ranks.join()
        return _measure_gpu(used_before_bytes)
    ranks.join()
    return _measure_cpu()


def _measure_gpu(used_before_bytes: int) -> DeviceConstants:
    """Context and workspaces: what is used of the card and is neither torch's reserve nor another process's."""
    free_bytes, _ = torch.cuda.mem_get_info()
    spec = _largest_run(free_bytes)
    torch.cuda.reset_peak_memory_stats()
    _train(spec)
    torch.cuda.synchronize()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    beside_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved() - used_before_bytes
    ratio = reserved_ratio(torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated())
    return DeviceConstants(torch.cuda.get_device_name(), max(0, beside_bytes), ratio, SOURCE)


def _measure_cpu() -> DeviceConstants:
    """The resident memory of a rank, its tensors left out. The CPU's allocator keeps no statistics of what it takes."""
    counter = allocator(CPU)
    engine = _train(load_spec(*TINY))
    held_bytes = counter.read().held_bytes if counter else 0  # without a compiler these few MiB are not told apart
    del engine
    return DeviceConstants(CPU, _resident_bytes() - held_bytes, None, SOURCE)


def _largest_run(free_bytes: int) -> Spec:
    """The largest of GPU_RUNS that is predicted to fit."""
    precision = "bf16" if ranks.has_bf16() else "fp16"
    for name, overrides in GPU_RUNS:
        spec = load_spec(name, [*overrides, f"training.precision={precision}"])
        if estimate_memory(workload(spec), 1, _micro_batch_size(spec)).fits(free_bytes):
            return spec
    raise UserError(
        f"given a GPU with {format_bytes(free_bytes)} free; not even preset quickstart fits; end what else runs on it"
    )


def _train(spec: Spec) -> object:
    """A few steps on tokens that mean nothing. Returns the engine, whose states live as long as it."""
    micro_batch_size = _micro_batch_size(spec)
    engine = start_engine(spec, build_ds_config(spec, 1, ranks.device_type(), micro_batch_size))
    tokens = torch.randint(spec.vocab_size, (micro_batch_size, spec.batch.sequence_length), device=ranks.device())
    for _ in range(STEPS * engine.gradient_accumulation_steps()):
        engine.backward(engine(input_ids=tokens, labels=tokens))
        engine.step()
    return engine


def _micro_batch_size(spec: Spec) -> int:
    size = spec.batch.micro_batch_size
    assert size != "auto", "every run of calibrate names its micro-batch"
    return size


def _used_bytes() -> int:
    """What other processes use of the GPU now, by the driver's word; 0 where it gives none."""
    gpus = local_gpus()
    return gpus[0].used_bytes if gpus else 0


def _resident_bytes() -> int:
    """Of this process, shared libraries included (proc(5), statm)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
