"""What a kernel is for, by its name: CUDA's, or on a CPU torch's operators."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

GROUPS = {
    # torch.compile's names list what a kernel fuses, `_to_copy` among it, and so fit any group
    "compiled": r"^triton_(poi|per|red|tem|for)_",
    "communication": r"nccl|gloo|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|broadcast_",
    "optimizer": r"adam|multi_tensor|foreach|fusedoptimizer",
    "attention": r"flash|fmha|attention|cudnn.*sdpa|mha_",
    "loss": r"cross_entropy|softmax|nll_loss|liger.*ce|element_mul_kernel",
    "norms": r"layer_?norm|rms_?norm|rsqrt|_norm_forward|_norm_backward|batch_norm",
    "matmul": r"gemm|cutlass|nvjet|xmma|cublas|splitk|aten::(mm|bmm|addmm|matmul|linear|baddbmm)\b|mkldnn",
    "copies": r"memcpy|memset|copy|aten::(cat|fill_|zero_|to)\b|catarray",
    "elementwise": r"elementwise|gelu|silu|swiglu|rope|vectorized|reduce_kernel|aten::(add|mul|div|sum|tanh)",
}
"""In order: the first whose pattern is in the name. liger-kernel's loss scales its gradients by element_mul_kernel."""
OTHER = "other"


def group_of(kernel: str) -> str:
    """Its group; OTHER for what nothing fits."""
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def grouped_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """By group, the longest first; `seconds` are of kernels, by name."""
    found: dict[str, float] = defaultdict(float)
    for kernel, each in seconds.items():
        found[group_of(kernel)] += each
    return dict(sorted(found.items(), key=lambda item: -item[1]))
