"""Throughputs that llm-foundry publishes for its MPT models: what one number was fitted to, and what it was not.

The A100 rows gave the share that matrix products reach (dsllm/plan/cost.py, Assumptions); those of the H100 played no
part. From https://github.com/mosaicml/llm-foundry/tree/main/scripts/train/benchmarking: every 16-bit row with sequences
of up to 4,096 tokens. FSDP over all ranks, eager PyTorch with a fused attention, whole logits.
"""

from __future__ import annotations

from typing import NamedTuple

from dsllm.plan.cost import Machine, run_cost, step_time
from dsllm.plan.hardware import gpu_named
from dsllm.plan.known_runs import shape
from dsllm.plan.workload import Workload, ZeroSettings

MODELS = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}
"""Layers, width and heads, from the yamls beside the table; 50,368 tokens."""


class Row(NamedTuple):
    model: str
    sequence_length: int
    num_gpus: int
    micro_batch_size: int
    accumulation_steps: int
    tokens_per_second_per_gpu: int
    is_checkpointed: bool


def predicted(row: Row, gpu: str) -> float:
    """Tokens a second on each GPU."""
    layers, width, heads = MODELS[row.model]
    run = Workload(
        shape=shape("gpt2", layers, width, heads, 50368, positions=row.sequence_length),
        sequence_length=row.sequence_length,
        global_batch_size=row.micro_batch_size * row.accumulation_steps * row.num_gpus,
        micro_batch_size=row.micro_batch_size,
        train_steps=1,
        activation_checkpointing="full" if row.is_checkpointed else "none",
        loss="plain",
        zero=ZeroSettings(stage=3),
    )
    machine = Machine.of(gpu_named(gpu), row.num_gpus)
    cost = run_cost(run, machine, step_time(run, machine, row.micro_batch_size))
    return cost.tokens_per_second / row.num_gpus


ROWS = {
    "a100-40gb": (
        Row("70b", 2048, 128, 4, 1, 376, True),
        Row("70b", 2048, 64, 2, 1, 276, True),
        Row("30b", 2048, 128, 6, 1, 865, True),
        Row("30b", 2048, 32, 4, 1, 857, True),
        Row("13b", 4096, 8, 2, 16, 1603, True),
        Row("13b", 2048, 128, 16, 1, 1972, True),
        Row("13b", 2048, 64, 16, 1, 1976, True),
        Row("13b", 2048, 32, 14, 1, 1998, True),
        Row("13b", 2048, 16, 10, 1, 1993, True),
        Row("13b", 2048, 8, 4, 16, 1668, True),
        Row("13b", 1024, 8, 8, 16, 1727, True),
        Row("13b", 512, 8, 16, 16, 1763, True),
        Row("7b", 4096, 8, 6, 4, 3366, True),
        Row("7b", 2048, 128, 18, 1, 3623, True),
        Row("7b", 2048, 64, 18, 1, 3665, True),
        Row("7b", 2048, 32, 18, 1, 3725, True),
        Row("7b", 2048, 16, 16, 1, 3645, True),
        Row("7b", 2048, 8, 12, 4, 3679, True),
        Row("7b", 1024, 8, 24, 4, 3854, True),
        Row("7b", 512, 8, 48, 4, 3895, True),
        Row("3b", 4096, 8, 2, 8, 8777, False),
        Row("3b", 2048, 128, 6, 1, 9538, False),
        Row("3b", 2048, 64, 6, 1, 9736, False),
        Row("3b", 2048, 32, 6, 1, 9914, False),
        Row("3b", 2048, 16, 5, 1, 9750, False),
        Row("3b", 2048, 8, 5, 8, 10065, False),
        Row("3b", 1024, 8, 10, 8, 10731, False),
        Row("3b", 512, 8, 20, 8, 11324, False),
        Row("1b", 4096, 8, 4, 8, 16856, False),
        Row("1b", 2048, 128, 10, 1, 18647, False),
        Row("1b", 2048, 64, 10, 1, 19001, False),
        Row("1b", 2048, 32, 10, 1, 15555, False),
        Row("1b", 2048, 16, 8, 1, 19085, False),
        Row("1b", 2048, 8, 8, 8, 19271, False),
        Row("1b", 1024, 8, 16, 8, 20959, False),
        Row("1b", 512, 8, 32, 8, 21782, False),
        Row("760m", 4096, 8, 6, 4, 25863, False),
        Row("760m", 2048, 128, 12, 1, 28940, False),
        Row("760m", 2048, 64, 12, 1, 29344, False),
        Row("760m", 2048, 32, 12, 1, 29648, False),
        Row("760m", 2048, 16, 12, 1, 29607, False),
        Row("760m", 2048, 8, 12, 4, 30173, False),
        Row("760m", 1024, 8, 24, 4, 33422, False),
        Row("760m", 512, 8, 48, 4, 34938, False),
        Row("350m", 4096, 8, 8, 4, 46833, False),
        Row("350m", 2048, 128, 18, 1, 51934, False),
        Row("350m", 2048, 64, 18, 1, 52689, False),
        Row("350m", 2048, 32, 18, 1, 53811, False),
        Row("350m", 2048, 16, 18, 1, 55413, False),
        Row("350m", 2048, 8, 16, 4, 55995, False),
        Row("350m", 1024, 8, 32, 4, 62523, False),
        Row("350m", 512, 8, 64, 4, 66284, False),
        Row("125m", 4096, 8, 13, 3, 115162, False),
        Row("125m", 2048, 128, 26, 1, 123936, False),
        Row("125m", 2048, 64, 26, 1, 125234, False),
        Row("125m", 2048, 32, 26, 1, 127122, False),
        Row("125m", 2048, 16, 26, 1, 130535, False),
        Row("125m", 2048, 8, 26, 3, 136334, False),
        Row("125m", 1024, 8, 52, 3, 148289, False),
        Row("125m", 512, 8, 104, 3, 156735, False),
    ),
    "a100-80gb": (
        Row("70b", 2048, 64, 8, 4, 410, True),
        Row("70b", 2048, 32, 2, 16, 373, True),
        Row("30b", 4096, 8, 1, 21, 814, True),
        Row("30b", 2048, 8, 3, 21, 916, True),
        Row("30b", 1024, 8, 6, 21, 946, True),
        Row("30b", 512, 8, 12, 21, 967, True),
        Row("13b", 4096, 8, 10, 3, 2060, True),
        Row("13b", 2048, 8, 2, 3, 2262, False),
        Row("13b", 1024, 8, 40, 3, 2330, True),
        Row("7b", 4096, 8, 16, 2, 3684, True),
        Row("7b", 2048, 8, 6, 2, 4641, False),
        Row("7b", 1024, 8, 64, 2, 4357, True),
        Row("3b", 4096, 8, 5, 6, 9457, False),
        Row("3b", 2048, 8, 10, 2, 10811, False),
        Row("3b", 1024, 8, 20, 6, 11580, False),
        Row("3b", 512, 8, 40, 6, 12127, False),
        Row("1b", 4096, 8, 7, 4, 17807, False),
        Row("1b", 2048, 8, 14, 4, 20513, False),
        Row("1b", 1024, 8, 18, 4, 22112, False),
        Row("1b", 512, 8, 56, 4, 23148, False),
        Row("760m", 4096, 8, 12, 2, 27351, False),
        Row("760m", 2048, 8, 24, 2, 32434, False),
        Row("760m", 1024, 8, 48, 2, 29765, False),
        Row("760m", 512, 8, 96, 2, 29446, False),
        Row("350m", 4096, 8, 16, 2, 49555, False),
        Row("350m", 2048, 8, 32, 2, 58782, False),
        Row("350m", 1024, 8, 64, 2, 64813, False),
        Row("350m", 512, 8, 128, 2, 69330, False),
        Row("125m", 4096, 8, 16, 2, 118396, False),
        Row("125m", 2048, 8, 40, 2, 142830, False),
        Row("125m", 2048, 8, 32, 2, 141737, False),
        Row("125m", 1024, 8, 64, 2, 156468, False),
        Row("125m", 512, 8, 128, 2, 165681, False),
    ),
    "h100-80gb": (
        Row("70b", 2048, 512, 8, 1, 1007, True),
        Row("70b", 2048, 256, 8, 1, 1035, True),
        Row("70b", 2048, 128, 8, 1, 1058, True),
        Row("30b", 2048, 512, 8, 1, 2115, True),
        Row("30b", 2048, 256, 8, 1, 2148, True),
        Row("30b", 2048, 128, 8, 1, 2199, True),
        Row("13b", 2048, 512, 16, 1, 4952, True),
        Row("13b", 2048, 256, 16, 1, 4989, True),
        Row("13b", 2048, 128, 16, 1, 5080, True),
        Row("7b", 2048, 512, 6, 1, 9670, False),
        Row("7b", 2048, 256, 6, 1, 10119, False),
        Row("7b", 2048, 128, 6, 1, 10475, False),
        Row("3b", 2048, 512, 8, 1, 21664, False),
        Row("3b", 2048, 256, 8, 1, 22772, False),
        Row("3b", 2048, 128, 8, 1, 23422, False),
        Row("1b", 2048, 512, 12, 1, 39837, False),
        Row("1b", 2048, 256, 12, 1, 42555, False),
        Row("1b", 2048, 128, 12, 1, 44123, False),
        Row("70b", 2048, 64, 8, 4, 1039, True),
        Row("70b", 2048, 32, 2, 16, 882, True),
        Row("30b", 4096, 8, 1, 21, 1802, True),
        Row("30b", 2048, 32, 14, 3, 2308, True),
        Row("30b", 2048, 16, 10, 3, 2263, True),
        Row("30b", 2048, 8, 3, 21, 2002, True),
        Row("30b", 1024, 8, 6, 21, 2084, True),
        Row("13b", 4096, 8, 10, 3, 4717, True),
        Row("13b", 2048, 64, 2, 1, 4800, False),
        Row("13b", 2048, 32, 2, 1, 4811, False),
        Row("13b", 2048, 16, 2, 1, 4767, False),
        Row("13b", 2048, 8, 2, 1, 4792, False),
        Row("13b", 1024, 8, 40, 3, 5502, True),
        Row("7b", 4096, 8, 16, 2, 8611, True),
        Row("7b", 2048, 8, 6, 1, 10643, False),
        Row("7b", 1024, 8, 64, 2, 10203, True),
        Row("3b", 4096, 8, 5, 6, 20964, False),
        Row("3b", 2048, 64, 6, 3, 22525, False),
        Row("3b", 2048, 32, 6, 3, 23021, False),
        Row("3b", 2048, 16, 10, 3, 24142, False),
        Row("3b", 1024, 8, 20, 6, 27046, False),
        Row("3b", 512, 8, 40, 6, 27965, False),
        Row("1b", 4096, 8, 7, 4, 38535, False),
        Row("1b", 2048, 64, 20, 1, 44402, False),
        Row("1b", 2048, 32, 20, 1, 45130, False),
        Row("1b", 2048, 16, 20, 1, 46037, False),
        Row("1b", 2048, 8, 14, 1, 45455, False),
        Row("1b", 1024, 8, 18, 4, 48910, False),
        Row("1b", 512, 8, 56, 4, 52275, False),
        Row("760m", 4096, 8, 12, 2, 55459, False),
        Row("760m", 2048, 32, 24, 1, 67971, False),
        Row("760m", 2048, 16, 24, 1, 68551, False),
        Row("760m", 2048, 8, 24, 2, 63147, False),
        Row("760m", 1024, 8, 48, 2, 78581, False),
        Row("760m", 512, 8, 96, 2, 83749, False),
    ),
}
