"""The loop that everyone writes first: a transformers model, its own loss, DeepSpeed and random tokens.

The speed that dsllm is measured against. Started by bench.py: `deepspeed bare_deepspeed.py --model FOLDER ...`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder with the model's config.json")
    parser.add_argument("--ds-config", help="DeepSpeed's JSON")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--output", type=Path, help="JSON list of the seconds that each step took")
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()

    deepspeed.init_distributed()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=torch.float32)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.ds_config)
    shape = (engine.train_micro_batch_size_per_gpu(), args.sequence_length)
    step_seconds = []
    for _ in range(args.steps):
        started = time.perf_counter()
        for _ in range(engine.gradient_accumulation_steps()):
            input_ids = torch.randint(model.config.vocab_size, shape, device=engine.device)
            loss = engine(input_ids=input_ids, labels=input_ids).loss
            engine.backward(loss)
            engine.step()
        loss.item()
        step_seconds.append(time.perf_counter() - started)
    if torch.distributed.get_rank() == 0:
        args.output.write_text(json.dumps(step_seconds))


if __name__ == "__main__":
    main()
