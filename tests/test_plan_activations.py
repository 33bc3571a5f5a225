"""What a micro-batch holds, against hand arithmetic and against what autograd was seen to save."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsllm.plan.activations import activations, block_bytes_per_token
from dsllm.plan.attention import attention_kernel
from dsllm.plan.workload import Workload, workload
from dsllm.spec.load import load_spec

MIB = 2**20
TOKENS = 8 * 1024
BOUNDARY = 2 * 768
BLOCK = 24_632  # bytes a token of GPT-2 small in bf16
VOCABULARY = 50_304


def gpt2(*overrides: str) -> Workload:
    return workload(load_spec("gpt2-124m", overrides))


def test_a_gpt2_block_saves_what_autograd_was_seen_to_save() -> None:
    # counted with saved-tensor hooks on the real block
    assert block_bytes_per_token(gpt2()) == BLOCK
    assert block_bytes_per_token(gpt2("training.precision=fp32")) == 49_216


def test_a_llama_block_saves_what_autograd_was_seen_to_save() -> None:
    assert block_bytes_per_token(workload(load_spec("llama-248m"))) == 54_408
    assert block_bytes_per_token(workload(load_spec("llama-248m", ["training.precision=fp32"])), "cpu") == 100_488


def test_saved_activations_by_hand() -> None:
    by_hand = {"none": 12 * BLOCK, "selective": 6 * BLOCK + 6 * BOUNDARY, "full": 12 * BOUNDARY}
    for checkpointing, blocks in by_hand.items():
        run = gpt2(f"training.activation_checkpointing={checkpointing}")
        # and the input of the final norm
        assert activations(run, 8).saved_bytes == TOKENS * (blocks + BOUNDARY)


def test_a_block_that_is_computed_again_lives_beside_the_kept_inputs() -> None:
    gradients = 2 * (768 + 3072)  # of the residual stream and of the feed-forward's width
    assert activations(gpt2(), 8).block_backward_bytes == TOKENS * (gradients - BOUNDARY)
    full = gpt2("training.activation_checkpointing=full")
    assert activations(full, 8).block_backward_bytes == TOKENS * (BLOCK - BOUNDARY + gradients - BOUNDARY)


def test_the_plain_loss_by_hand() -> None:
    acts = activations(gpt2("training.loss=plain"), 8)
    hidden, logits = TOKENS * BOUNDARY, TOKENS * VOCABULARY
    assert acts.loss_forward_bytes == hidden + 8 * logits  # fp32 logits and their log-softmax
    assert acts.loss_backward_bytes == hidden + 12 * logits  # the latter, and two gradients


def test_the_chunked_loss_by_hand() -> None:
    hidden, projection = TOKENS * BOUNDARY, VOCABULARY * 768
    logits = 64 * MIB // (4 * VOCABULARY) * VOCABULARY  # of whole tokens
    acts = activations(gpt2(), 8)
    # hidden states and their gradient, the projection's in fp32, a piece in fp32 and bf16, a product of 32 MiB
    assert acts.loss_forward_bytes == 2 * hidden + 4 * projection + 6 * logits + 32 * MIB
    assert acts.loss_backward_bytes == 2 * hidden + 4 * projection
    on_cpu = activations(gpt2(), 8, "cpu")
    assert on_cpu.loss_forward_bytes == acts.loss_forward_bytes + 64 * MIB  # the product once more, in fp32
    fp32 = activations(gpt2("training.precision=fp32"), 8)
    assert fp32.loss_forward_bytes == 4 * hidden + 4 * projection + 4 * logits
    assert fp32.loss_backward_bytes == 4 * hidden + 8 * projection


def test_dropout_costs_a_byte_an_element_on_a_gpu_and_attention_rows_on_the_cpu() -> None:
    dropping = gpt2("model.dropout=0.1")
    assert block_bytes_per_token(dropping) == BLOCK + 2 * 768
    # on the CPU in fp32: softmax, mask and product, and query, key and value once more
    rows, inputs = 12 * 1024 * 3 * 4 - 12 * 4, 3 * 768 * (4 - 2)
    assert block_bytes_per_token(dropping, "cpu") == BLOCK + 2 * 768 * 2 + rows + inputs


def test_plain_attention_keeps_whole_rows_once_and_three_of_them_in_backward() -> None:
    eager = gpt2("model.attention=eager")
    assert block_bytes_per_token(eager) == BLOCK - 12 * 4 + 12 * 1024 * 2
    assert activations(eager, 8).first_block_bytes == TOKENS * (3 * 12 * 1024 * 2 + 6 * BOUNDARY)


def test_fp32_with_grouped_queries_has_no_fused_kernel_on_cuda() -> None:
    run = workload(load_spec("llama-248m", ["training.precision=fp32"]))
    assert (attention_kernel(run, "cuda"), attention_kernel(run, "cpu")) == ("math", "flash")
    shape = run.shape
    more = shape.num_attention_heads * (1024 * 4 - 4) + 2 * (shape.hidden_size - shape.key_value_size) * 4
    assert block_bytes_per_token(run) == block_bytes_per_token(run, "cpu") + more


def test_a_mask_is_kept_once_for_all_blocks() -> None:
    masked = gpt2("data.mask_documents=true")
    assert (attention_kernel(masked, "cuda"), attention_kernel(masked, "cpu")) == ("efficient", "flash")
    assert block_bytes_per_token(masked) == BLOCK
    for name in ("saved_bytes", "first_block_bytes"):
        assert getattr(activations(masked, 8), name) == getattr(activations(gpt2(), 8), name) + TOKENS * 1024 * 2


def test_beside_a_mask_keys_and_values_are_repeated_and_rotary_tables_are_the_sequences_own() -> None:
    run = workload(load_spec("llama-248m"))
    masked = replace(run, masks_documents=True)
    assert (
        attention_kernel(masked, "cuda") == attention_kernel(replace(masked, precision="fp32"), "cuda") == "efficient"
    )
    shape, layers = run.shape, run.shape.num_layers
    repeated = 2 * 2 * (shape.hidden_size - shape.key_value_size)
    assert block_bytes_per_token(masked) == block_bytes_per_token(run) + repeated
    shared = 2 * (1024 + 2 * shape.hidden_size // shape.num_attention_heads)
    more = activations(masked, 8).saved_bytes - activations(run, 8).saved_bytes
    assert more == TOKENS * (layers * repeated + shared)


def test_heads_that_no_fused_kernel_takes_beside_a_mask_keep_whole_rows() -> None:
    assert attention_kernel(workload(load_spec("1b", ["data.mask_documents=true"])), "cuda") == "math"


def test_plain_attention_keeps_its_mask_only_for_blocks_that_are_computed_again() -> None:
    eager = gpt2("model.attention=eager")
    none, full = (replace(eager, activation_checkpointing=kind) for kind in ("none", "full"))
    assert activations(none, 8).saved_bytes == TOKENS * (12 * block_bytes_per_token(eager) + BOUNDARY)
    assert activations(full, 8).saved_bytes == TOKENS * (12 * BOUNDARY + BOUNDARY + 2 * 1024)


def test_flash_attention_pads_heads_of_50_to_56() -> None:
    run = workload(load_spec("1b"))
    # query, key and value padded, the output padded, and beside it a copy without
    padding = 2 * (3 * 32 * 6 + 32 * 56)
    assert block_bytes_per_token(run) == block_bytes_per_token(run, "cpu") + padding


@pytest.mark.parametrize("loss", ["chunked", "fused", "plain"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_everything_grows_with_the_micro_batch(loss: str, checkpointing: str) -> None:
    run = replace(gpt2(), loss=loss, activation_checkpointing=checkpointing)
    small, large = activations(run, 4), activations(run, 8)
    assert all(getattr(small, name) <= getattr(large, name) for name in vars(small))
