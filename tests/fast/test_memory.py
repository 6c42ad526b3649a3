"""What the memory estimate counts; tests/training/test_memory_peak.py counts the same on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.memory import MemoryParts, estimate
from orchestrator.planning.model_shape import shape_of
from tests.fast.cases import LLAMA_2_7B, LLAMA_32_3B

SEVEN_B, THREE_B = shape_of(LLAMA_2_7B), shape_of(LLAMA_32_3B)
EIGHT_B = shape_of(LLAMA_32_3B | {"hidden_size": 4096, "num_hidden_layers": 32, "tie_word_embeddings": False})
GIB = 2**30


def parts(shape: Any = THREE_B, **settings: Any) -> MemoryParts:
    config = TrialConfig.model_validate({"micro_batch_size": 1, "global_batch_size": 1, "engine": "ddp"} | settings)
    return estimate(config, shape, 1, "cuda", has_bf16=True).parts


def test_autocast_spares_qlora_the_scores_that_fp32_attention_with_grouped_queries_writes_out() -> None:
    def growth(precision: str) -> float:
        """Activations of 8,192 tokens over those of 2,048: four times, unless something grows with the square."""
        long, short = (
            parts(precision=precision, sequence_length=n, gradient_checkpointing=True).activations for n in (8192, 2048)
        )
        return long / short

    assert growth("nf4") < 4.1
    assert growth("fp32") > 6


def test_eager_attention_grows_with_the_square_of_the_sequence() -> None:
    eager, sdpa = (parts(attention=kind, sequence_length=4096).activations for kind in ("eager", "sdpa"))
    # Softmax in fp32 and its cast to bf16, in each of the layers.
    assert eager - sdpa >= THREE_B.layers * THREE_B.heads * 4096**2 * 6


def test_checkpointing_does_not_spare_what_int8_products_keep_of_their_inputs() -> None:
    def kept_per_token(precision: str) -> float:
        long, short = (
            parts(SEVEN_B, precision=precision, sequence_length=n, gradient_checkpointing=True, engine="deepspeed")
            for n in (2048, 1024)
        )
        return (long.activations - short.activations) / 1024

    inputs = 2 * (3 * SEVEN_B.hidden + SEVEN_B.intermediate) * SEVEN_B.layers
    assert kept_per_token("int8") - kept_per_token("nf4") == pytest.approx(inputs, rel=0.1)


def test_gradients_of_earlier_micro_batches_are_there_when_the_loss_is_worked_out() -> None:
    at_once = {"rank": "full", "micro_batch_size": 8, "sequence_length": 2048}
    alone = parts(**at_once, global_batch_size=8)
    accumulated = parts(**at_once, global_batch_size=16)
    assert alone.gradients == 0
    assert accumulated.gradients == THREE_B.parameters * 2
    assert accumulated.activations == alone.activations


def test_the_allocator_is_expected_to_keep_for_training_though_loading_holds_more() -> None:
    config = TrialConfig.model_validate({"precision": "nf4", "micro_batch_size": 1, "sequence_length": 512})
    memory = estimate(config, EIGHT_B, 1, "cuda", has_bf16=True)
    assert memory.parts.activations == 0, "loading holds most"
    assert memory.reserved_bytes > 1.02 * memory.allocated_bytes
    assert memory.needed_bytes <= memory.device_bytes


def test_the_loss_is_the_largest_part_of_a_small_model_with_a_large_vocabulary() -> None:
    counted = parts(precision="bf16", gradient_checkpointing=True, micro_batch_size=4, sequence_length=2048)
    assert counted.biggest == "logits"
    # The logits in bf16, and log-softmax's result and two gradients in fp32.
    assert counted.logits == 4 * 2048 * THREE_B.vocabulary * 14
