"""Rules between fields: each refusal names both sides and a remedy, and what the rules admit stays admitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsllm.errors import SpecError
from dsllm.spec.load import load_spec

SPEC = """
name: small
model: {family: llama, num_layers: 2, hidden_size: 64, num_attention_heads: 4, max_position_embeddings: 128}
tokenizer: {kind: sentencepiece, vocab_size: 512}
data: {sources: [{kind: python-stdlib}]}
batch: {sequence_length: 128, global_batch_size: 8, micro_batch_size: 4}
training: {train_steps: 10}
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "spec.yaml").write_text(SPEC)
    return str(tmp_path / "spec.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optimizer.muon_learning_rate=0.1"],
            "optimizer.muon_learning_rate: given 0.1 with optimizer adamw; only muon has it; remove it, or set",
        ),
        (["optimizer.muon_momentum=0.9"], "optimizer.muon_momentum: given 0.9 with optimizer adamw; only muon has it"),
        (
            ["optimizer.name=muon", "zero={stage: 3, offload_optimizer: nvme, nvme_path: /nvme}"],
            "optimizer.name: given muon with zero.offload_optimizer nvme, where its momentum has no place; set "
            "zero.offload_optimizer to cpu or none, or optimizer.name to adamw",
        ),
        (
            ["optimizer.fused=false", "zero.offload_optimizer=cpu"],
            "optimizer.fused: given false with zero.offload_optimizer cpu, where DeepSpeed's own CPUAdam steps",
        ),
        (
            ["model.family=gpt2", "training.kernels=liger"],
            "training.kernels: given liger with family gpt2, for which liger-kernel has none; set it to auto or torch",
        ),
        (
            ["training.kernels=liger", "training.compile=true"],
            "training.kernels: given liger with training.compile true, which fuses the same operations; set",
        ),
        (
            ["model.hidden_size=66"],
            "model.num_attention_heads: given 4 with hidden_size 66; the heads must divide the width; "
            "try num_attention_heads 3, or hidden_size 64",
        ),
        (
            ["model.hidden_size=20"],
            "model.num_attention_heads: given 4 with hidden_size 20, which is 5 a head; rotary positions need an even",
        ),
        (
            ["model.num_key_value_heads=3"],
            "model.num_key_value_heads: given 3 with num_attention_heads 4; the former must divide the latter; try 2",
        ),
        (["model.dropout=0.1"], "model.dropout: given 0.1 with family llama, which has no such thing; remove it"),
        (
            ["model.family=gpt2", "model.num_key_value_heads=2"],
            "model.num_key_value_heads: given 2 with family gpt2, which has no such thing; remove it",
        ),
        (
            ["model.family=gpt2", "model.rope_theta=5e5"],
            "model.rope_theta: given 500000.0 with family gpt2, which has no such thing",
        ),
        (
            ["model.family=qwen2", "model.head_size=32"],
            "model.head_size: given 32 with family qwen2, which has no such thing; remove it",
        ),
        (
            ["model.sliding_window=64"],
            "model.sliding_window: given 64 with family llama, which has no such thing; remove it",
        ),
        (
            ["model.num_experts=4"],
            "model.num_experts: given 4 with family llama, which has no such thing; remove it",
        ),
        (
            ["model.head_size=33"],
            "model.head_size: given 33; rotary positions need an even number; try 34",
        ),
        (
            ["model.family=mixtral", "model.num_experts=4", "model.num_experts_per_token=5"],
            "model.num_experts_per_token: given 5 with num_experts 4; a token cannot take more experts than there are; "
            "lower it to 4 or less, or raise num_experts",
        ),
        (
            ["model.family=mixtral", "model.num_experts_per_token=1"],
            "model.num_experts_per_token: given 1; the chosen experts share a weight of 1, and the router of a single "
            "one would learn nothing; give 2 or more",
        ),
        (
            ["model.family=mixtral", "model.intermediate_size=100"],
            "model.intermediate_size: given 100 with precision bf16; experts are multiplied together, for which it "
            "must be a multiple of 8; try 96",
        ),
        (
            ["model={family: auto}"],
            "model.config: missing, and model.init is scratch, which has none; give a folder that has a config.json",
        ),
        (
            ["model={family: auto, config: {hidden_size: 64}}"],
            "model.config.model_type: missing; it says which of transformers' models the other keys describe; give it",
        ),
        (
            ["model={family: auto, config: {model_type: gpt2, n_positions: 8}}"],
            "batch.sequence_length: given 128; the model reads at most model.max_position_embeddings = 8",
        ),
        (
            ["model.vocab_size=500"],
            "model.vocab_size: given 500; the tokenizer has 512 tokens and the model must know them all; set it to 512",
        ),
        (
            ["tokenizer={kind: pretrained, name: my/tokenizer}"],
            "model.vocab_size: missing, and the size of this pretrained tokenizer is only known from its files "
            "(known without: gpt2); set model.vocab_size",
        ),
        (
            ["batch.sequence_length=256"],
            "batch.sequence_length: given 256; the model reads at most model.max_position_embeddings = 128; shorten",
        ),
        (
            ["batch.micro_batch_size=16"],
            "batch.micro_batch_size: given 16; it cannot exceed global_batch_size = 8; set it to 8",
        ),
        (
            ["batch.micro_batch_size=3"],
            "batch.micro_batch_size: given 3; it must divide global_batch_size = 8; "
            "try micro_batch_size 2, or global_batch_size 9",
        ),
        (
            ["training.train_steps=null"],
            "training: neither tokens nor train_steps is given; one of them must end the run",
        ),
        (
            ["schedule.warmup_steps=11"],
            "schedule.warmup_steps: given 11; the whole run has 10 steps; lower it, or lengthen the run",
        ),
        (
            ["schedule.warmup_steps=5", "training.tokens=2048"],
            "schedule.warmup_steps: given 5; the whole run has 2 steps",
        ),
        (
            ["schedule.name=wsd", "schedule.warmup_steps=6", "schedule.decay_fraction=0.5"],
            "schedule.decay_fraction: given 0.5 after 6 steps of warm-up; the two must fit in the run's 10 steps",
        ),
        (
            ["schedule.decay_fraction=0.5"],
            "schedule.decay_fraction: given 0.5 with schedule cosine; only wsd has a decay",
        ),
        (
            ["schedule.name=constant", "schedule.min_learning_rate_ratio=0.5"],
            "schedule.min_learning_rate_ratio: given 0.5 with schedule constant, which never falls; remove it",
        ),
        (["training.loss_scale=128"], "training.loss_scale: given 128 with precision bf16; only fp16 scales its loss"),
        (
            ["training.gradient_accumulation_precision=fp16"],
            "training.gradient_accumulation_precision: given fp16 with precision bf16; gradients add up in fp32 or",
        ),
        (
            ["training.precision=fp32", "training.gradient_accumulation_precision=bf16"],
            "training.gradient_accumulation_precision: given bf16 with precision fp32; gradients add up in fp32 or",
        ),
        (
            ["zero.stage=0", "training.gradient_accumulation_precision=fp32"],
            "training.gradient_accumulation_precision: given fp32 with precision bf16 at zero.stage 0, where DeepSpeed "
            "cannot; set it to auto or bf16, or zero.stage to 1 or more",
        ),
        (
            ["zero.stage=0", "zero.offload_optimizer=cpu"],
            "zero.offload_optimizer: given cpu at zero.stage 0; it needs zero.stage 1 or more; raise zero.stage, "
            "or set zero.offload_optimizer to none",
        ),
        (
            ["zero.stage=2", "zero.offload_optimizer=nvme", "zero.nvme_path=/nvme"],
            "zero.offload_optimizer: given nvme at zero.stage 2; it needs zero.stage 3; raise zero.stage, or set",
        ),
        (
            ["zero.stage=2", "zero.offload_param=cpu"],
            "zero.offload_param: given cpu at zero.stage 2; it needs zero.stage 3; raise zero.stage, or set",
        ),
        (
            ["zero.stage=3", "zero.offload_param=nvme"],
            "zero.nvme_path: missing; zero.offload_param is nvme; name a folder on the NVMe drive",
        ),
        (
            ["zero.nvme_path=/nvme"],
            "zero.nvme_path: given '/nvme', but nothing is offloaded to nvme; remove it, or set zero.offload_optimizer",
        ),
        (
            ["zero.stage=0", "zero.reduce_bucket_elements=1000"],
            "zero.reduce_bucket_elements: given 1000 at zero.stage 0, which ignores it; remove it, or set zero.stage",
        ),
        (
            ["zero.max_live_elements=1000"],
            "zero.max_live_elements: given 1000 at zero.stage 2, which ignores it; remove it, or set zero.stage to 3",
        ),
        (["zero.stage=0", "zero.overlap_comm=true"], "zero.overlap_comm: given true at zero.stage 0, which ignores it"),
        (
            ["zero.stage=1", "zero.reduce_bucket_elements=1000"],
            "zero.reduce_bucket_elements: given 1000 at zero.stage 1 with bf16 weights and fp32 accumulation, where "
            "DeepSpeed ignores it; remove it",
        ),
        (
            ["zero.gather_bucket_elements=1001"],
            "zero.gather_bucket_elements: given 1001; DeepSpeed wants an even number; use 1002",
        ),
        (
            ["launch.environment=[MY_KEY=s3cret]"],
            "launch.environment.0: given MY_KEY=…; names only, never values: a spec is kept with its run; set the",
        ),
        (
            ["launch.environment=[AWS_*, 'MY KEY']"],
            "launch.environment.1: given 'MY KEY'; a variable's name, or a pattern with * and ? such as AWS_*; must",
        ),
    ],
)
def test_a_broken_rule_names_what_was_given_the_rule_and_the_remedy(
    path: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(SpecError) as refusal:
        load_spec(path, overrides)
    (problem,) = refusal.value.problems
    assert problem.startswith(message)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_key_value_heads=2", "model.rope_theta=5e5"],
        ["model.family=gpt2", "model.hidden_size=20", "model.dropout=0.1"],
        ["model.vocab_size=600"],
        ["tokenizer={kind: pretrained, name: my/tokenizer}", "model.vocab_size=600"],
        ["schedule.name=wsd", "schedule.warmup_steps=5", "schedule.decay_fraction=0.5"],
        ["training.precision=fp16", "training.loss_scale=128"],
        ["zero.stage=0", "training.gradient_accumulation_precision=bf16"],
        ["zero.stage=1", "zero.offload_optimizer=cpu"],
        ["zero.stage=3", "zero.offload_optimizer=nvme", "zero.offload_param=cpu", "zero.nvme_path=/nvme"],
        ["zero.stage=3", "zero.offload_param=cpu"],
        ["zero.stage=0", "zero.overlap_comm=false"],
        ["launch.environment=[MY_KEY, 'AWS_*', '?_PROXY', '*']"],
        ["zero.stage=1", "zero.reduce_bucket_elements=1000", "training.gradient_accumulation_precision=bf16"],
        ["zero.stage=3", "zero.gather_bucket_elements=1001", "zero.max_live_elements=1", "zero.overlap_comm=true"],
    ],
)
def test_what_the_rules_admit(path: str, overrides: list[str]) -> None:
    load_spec(path, overrides)


def test_a_rule_is_left_out_while_a_section_that_it_reads_is_invalid(path: str) -> None:
    with pytest.raises(SpecError) as refusal:
        load_spec(path, ["batch.sequence_length=-1", "zero.offload_param=cpu"])
    assert [problem.split(":")[0] for problem in refusal.value.problems] == [
        "batch.sequence_length",
        "zero.offload_param",
    ]
