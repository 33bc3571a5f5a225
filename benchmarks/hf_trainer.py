"""The Hugging Face Trainer on DeepSpeed, with random tokens: the other speed that dsllm is measured against.

Started by bench.py and throughput.py: `deepspeed hf_trainer.py --model FOLDER ...`. Reporting, logging, saving and
evaluation are off.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class RandomTokens(torch.utils.data.Dataset):
    """As many sequences as a run reads, each a pure function of its index."""

    def __init__(self, num_sequences: int, sequence_length: int, vocab_size: int) -> None:
        self.num_sequences, self.sequence_length, self.vocab_size = num_sequences, sequence_length, vocab_size

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        input_ids = torch.randint(self.vocab_size, (self.sequence_length,), generator=generator)
        return {"input_ids": input_ids, "labels": input_ids}


class StepClock(TrainerCallback):
    """Seconds from the end of one step to the end of the next, reading of data included."""

    def __init__(self) -> None:
        self.step_ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_ends.append(time.perf_counter())

    def step_seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.step_ends, self.step_ends[1:], strict=False)]


def training_arguments(ds_config: dict[str, Any], steps: int, output: Path, recomputes: bool) -> TrainingArguments:
    """Arguments that agree with the JSON, as the Trainer demands, and that switch its extras off."""
    params = ds_config["optimizer"]["params"]
    return TrainingArguments(
        output_dir=str(output.parent / "hf"),
        deepspeed=ds_config,
        use_cpu=get_accelerator().device_name() == "cpu",
        max_steps=steps,
        per_device_train_batch_size=ds_config["train_micro_batch_size_per_gpu"],
        gradient_accumulation_steps=ds_config["gradient_accumulation_steps"],
        learning_rate=params["lr"],
        adam_beta1=params["betas"][0],
        adam_beta2=params["betas"][1],
        adam_epsilon=params["eps"],
        weight_decay=params["weight_decay"],
        max_grad_norm=ds_config["gradient_clipping"],
        lr_scheduler_type="constant",
        bf16=ds_config["bf16"]["enabled"],
        fp16=ds_config["fp16"]["enabled"],
        gradient_checkpointing=recomputes,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder with the model's config.json")
    parser.add_argument("--ds-config", type=Path, help="DeepSpeed's JSON")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="every block is computed again")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path, help="JSON list of the seconds that each step but the first took")
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()

    ds_config = json.loads(args.ds_config.read_text())
    config = AutoConfig.from_pretrained(args.model)
    clock = StepClock()
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config, dtype=torch.float32),
        args=training_arguments(ds_config, args.steps, args.output, args.gradient_checkpointing),
        train_dataset=RandomTokens(args.steps * ds_config["train_batch_size"], args.sequence_length, config.vocab_size),
        callbacks=[clock],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        args.output.write_text(json.dumps(clock.step_seconds()))


if __name__ == "__main__":
    main()
