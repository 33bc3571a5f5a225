"""dsllm: pre-train language models on DeepSpeed, from one validated spec."""

__version__ = "0.1.0"
