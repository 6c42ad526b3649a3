"""What the memory estimate counts; tests/training/test_memory_peak.py counts the same on fake tensors."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.compatibility import Case
from orchestrator.planning.hardware import GPUS, named_gpu
from orchestrator.planning.memory import (
    CPU_IMPORTS_BYTES,
    NCCL_ALONE_BYTES,
    NCCL_KERNELS_BYTES,
    WORKSPACE_BYTES,
    ZERO3_STEP_WEIGHTS,
    MemoryEstimate,
    MemoryParts,
    estimate,
    estimate_on,
    host_bytes_on,
    loading_bytes_on,
    outside_torch_bytes,
)
from orchestrator.planning.model_shape import shape_of
from orchestrator.planning.notes import fp32_grouped_queries_write_scores, offload_exceeds_the_host
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


def test_before_ampere_keys_repeated_for_each_query_head_take_the_place_of_scores() -> None:
    def activations(length: int, precision: str, has_bf16: bool) -> int:
        config = TrialConfig(precision=precision, micro_batch_size=1, global_batch_size=1, sequence_length=length)
        return estimate(config, THREE_B, 1, "cuda", has_bf16).parts.activations

    repeated = THREE_B.layers * 2 * 2 * 4096 * (THREE_B.heads - THREE_B.kv_heads) * THREE_B.head_dim
    assert activations(4096, "fp16", False) - activations(4096, "fp16", True) == pytest.approx(repeated, rel=0.01)
    assert activations(8192, "fp32", False) < 2.1 * activations(4096, "fp32", False)
    fp32 = TrialConfig(precision="fp32")
    assert fp32_grouped_queries_write_scores(Case(fp32, THREE_B, named_gpu("H100", 1), 1))
    assert fp32_grouped_queries_write_scores(Case(fp32, THREE_B, named_gpu("T4", 1), 1)) is None


def test_eager_attention_grows_with_the_square_of_the_sequence() -> None:
    eager, sdpa = (parts(attention=kind, sequence_length=4096).activations for kind in ("eager", "sdpa"))
    # Softmax in fp32 and its cast to bf16, in each of the layers.
    assert eager - sdpa >= THREE_B.layers * THREE_B.heads * 4096**2 * 6


@pytest.mark.parametrize(
    ("precision", "bytes_of_a_score"),
    [("bf16", 16 - 6), ("fp16", 14 - 6), ("fp32", 16 - 4), ("amp_bf16", 16 - 6)],
)
def test_softmaxs_backward_pass_holds_its_gradients_product_with_its_result_on_a_gpu(
    precision: str, bytes_of_a_score: int
) -> None:
    def beyond_sdpa(length: int) -> int:
        """Where a layer's backward pass is the peak: one head's share of the vocabulary's."""
        small = LLAMA_32_3B | {"vocab_size": 1000}
        eager, sdpa = (
            parts(shape_of(small), precision=precision, attention=kind, sequence_length=length).activations
            for kind in ("eager", "sdpa")
        )
        return eager - sdpa

    kept = THREE_B.layers * (4 if precision == "fp32" else 6)
    growth = (beyond_sdpa(16384) - beyond_sdpa(8192)) / (16384**2 - 8192**2) / THREE_B.heads
    if precision == "fp32":
        # There sdpa writes scores, too.
        assert growth == pytest.approx(0, abs=0.5)
    else:
        assert growth == pytest.approx(kept + bytes_of_a_score, rel=0.01)


SMOLLM2_360M = {
    "model_type": "llama",
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("attention", "allocated_gib", "reserved_gib"), [("sdpa", 3.6668, 3.8203), ("eager", 4.7935, 7.1328)]
)
def test_scores_cost_what_was_measured_of_them_on_a_t4(
    attention: str, allocated_gib: float, reserved_gib: float
) -> None:
    # Source: github.com/Anassbzdd/fitcheck, data/measurements/t4-sweep-2026-09-15.json: 4,096 tokens, fp16, rank 32.
    config = TrialConfig(
        rank=32,
        target_modules="attention",
        precision="fp16",
        engine="ddp",
        attention=attention,  # type: ignore[arg-type]
        micro_batch_size=1,
        global_batch_size=1,
        sequence_length=4096,
        gradient_checkpointing=True,
    )
    # What measured it is a loop of its own.
    told = estimate(config, shape_of(SMOLLM2_360M), 1, "cuda", has_bf16=False, loop="bare")
    assert told.allocated_bytes == pytest.approx(allocated_gib * GIB, rel=0.025)
    # What no formula of the settings tells of fragmentation, and what it does: eager attention alone reserves so much.
    assert told.reserved_bytes == pytest.approx(reserved_gib * GIB, rel=0.12)


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


def test_zero_3_makes_fp32_of_a_billion_gradients_at_a_time() -> None:
    counted = parts(rank="full", engine="deepspeed", zero_stage=3, gradient_checkpointing=True, sequence_length=128)
    assert counted.gradients == 4 * ZERO3_STEP_WEIGHTS + 2 * (THREE_B.parameters - ZERO3_STEP_WEIGHTS)
    assert counted.framework - WORKSPACE_BYTES == 4 * ZERO3_STEP_WEIGHTS, "made flat, once more"


def test_the_allocator_is_expected_to_keep_for_training_though_loading_holds_more() -> None:
    config = TrialConfig.model_validate({"precision": "nf4", "micro_batch_size": 1, "sequence_length": 512})
    memory = estimate(config, EIGHT_B, 1, "cuda", has_bf16=True)
    assert memory.parts.activations == 0, "loading holds most"
    assert memory.reserved_bytes > 1.02 * memory.allocated_bytes
    assert memory.needed_bytes <= memory.device_bytes


def test_the_loss_is_the_largest_part_of_a_small_model_with_a_large_vocabulary() -> None:
    counted = parts(precision="bf16", gradient_checkpointing=True, micro_batch_size=4, sequence_length=2048)
    assert counted.biggest == "logits"
    # Log-softmax's result and two gradients in fp32; the logits themselves are gone, but in a loop that holds them.
    assert counted.logits == 4 * 2048 * THREE_B.vocabulary * 12


LLAMA_3_8B = shape_of(
    LLAMA_32_3B
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
    | {"tie_word_embeddings": False}
)


def test_dora_keeps_two_tensors_of_each_matrixs_output() -> None:
    tokens, shape = 2048, LLAMA_3_8B
    settings = {"precision": "bf16", "engine": "deepspeed", "target_modules": "all-linear", "sequence_length": tokens}
    plain, dora = (parts(shape, **settings, dora=dora).total for dora in (False, True))
    outputs = sum(m.rows * m.count for m in shape.matrices)
    assert dora - plain == pytest.approx(2 * 2 * outputs * tokens, rel=0.01)


def test_dora_with_dropout_keeps_every_dequantised_weight() -> None:
    settings = {"precision": "nf4", "engine": "deepspeed", "target_modules": "all-linear", "lora_dropout": 0.1}
    plain, dora = (parts(LLAMA_3_8B, **settings, sequence_length=64, dora=dora).total for dora in (False, True))
    assert dora - plain > 1.9 * LLAMA_3_8B.linear_parameters
    spared = parts(LLAMA_3_8B, **settings, sequence_length=64, dora=True, gradient_checkpointing=True).total
    assert dora - spared > 1.9 * LLAMA_3_8B.linear_parameters


def weights_on_a_cpu(precision: str) -> int:
    """Where so little is trained on that loading holds most."""
    config = TrialConfig(precision=precision, micro_batch_size=1, global_batch_size=1, sequence_length=16)
    return estimate(config, THREE_B, 1, "cpu", has_bf16=True).parts.weights


def test_on_a_cpu_fp32_weights_lie_beside_the_pages_of_their_file_while_they_are_read() -> None:
    assert weights_on_a_cpu("fp32") == THREE_B.parameters * (2 + 4)
    # Those of the file's type are its pages.
    assert weights_on_a_cpu("bf16") == THREE_B.parameters * 2


def test_a_cpu_has_no_workspaces_of_cublas() -> None:
    config = TrialConfig(precision="bf16", micro_batch_size=8, global_batch_size=8, sequence_length=512)
    assert estimate(config, THREE_B, 1, "cpu", has_bf16=True).parts.framework == CPU_IMPORTS_BYTES


def test_on_a_cpu_embeddings_are_cast_up_from_the_files_pages_and_not_from_a_copy() -> None:
    rest = THREE_B.parameters - THREE_B.quantisable_parameters
    quantised = weights_on_a_cpu("int8") - THREE_B.parameters * 2 - rest * 4
    assert quantised == THREE_B.quantisable_parameters


def test_under_autocast_int8_products_are_in_half_on_a_cpu_and_in_fp32_on_a_gpu() -> None:
    config = TrialConfig(precision="int8", engine="ddp", micro_batch_size=1, global_batch_size=1, sequence_length=4096)
    gpu, cpu = (estimate(config, SEVEN_B, 1, device, has_bf16=True).parts.activations for device in ("cuda", "cpu"))
    # What gate and up returned, what the activation did, and what down was given.
    assert gpu - cpu == pytest.approx(SEVEN_B.layers * 4096 * 2 * 4 * SEVEN_B.intermediate, rel=0.05)


def test_offload_is_measured_against_the_memory_of_the_host() -> None:
    seventy = shape_of(
        LLAMA_2_7B
        | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
        | {"intermediate_size": 28672}
    )

    def told(workers: int, **settings: Any) -> str | None:
        offload = {"zero_stage": 3, "offload": "optimizer_and_parameters", "micro_batch_size": 1}
        config = TrialConfig.model_validate(offload | settings)
        return offload_exceeds_the_host(Case(config, seventy, named_gpu("H100", workers), workers))

    # bf16 weights, their fp32 copies, two moments, fp32 gradients and those as they were summed: 20 bytes a weight.
    config = TrialConfig(rank="full", zero_stage=3, offload="optimizer_and_parameters", micro_batch_size=1)
    assert host_bytes_on(config, seventy, 1, named_gpu("H100", 1)) == 20 * seventy.parameters
    assert host_bytes_on(config, seventy, 8, named_gpu("H100", 8)) == 20 * seventy.parameters // 8
    assert "1,285 GiB in the host memory of a node with 8 of its workers" in (told(8, rank="full") or "")
    assert told(16, rank="full") is None, "two nodes share it"
    assert told(8, rank=16) is None, "an adapter's state is small, and the frozen weights are shared out"
    assert told(8, rank=16, offload="optimizer") is None


OUTSIDE = Path(__file__).parents[2] / "benchmarks" / "data" / "outside_torch.csv"


def published_outside_torch(kind: str) -> list[tuple[str, int, float]]:
    """GPU, workers and bytes of each published process of this kind, on GPUs that have a name here."""
    with OUTSIDE.open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == kind and row["gpu"] in GPUS]
    beyond = [float(row["in_use_gib"]) - float(row["allocated_gib"]) - float(row["unallocated_gib"]) for row in rows]
    return [(row["gpu"], int(row["workers"]), gib * GIB) for row, gib in zip(rows, beyond, strict=True)]


def context_bytes(gpu: str) -> int:
    return outside_torch_bytes("ddp", 1, named_gpu(gpu, 1)) - NCCL_KERNELS_BYTES - NCCL_ALONE_BYTES


def test_a_context_is_as_large_as_published_processes_had_it_on_small_and_large_gpus() -> None:
    at_work = published_outside_torch("alone")
    assert {gpu for gpu, _, _ in at_work} == {"T4", "L4", "A100-40GB", "RTX-4090", "L40S", "RTX-5090"}
    for gpu, _, measured in at_work:
        assert context_bytes(gpu) == pytest.approx(measured, abs=60 * 2**20)
    for gpu, _, measured in published_outside_torch("bare"):
        assert 0 < context_bytes(gpu) - measured < 150 * 2**20, "with no kernel loaded it is smaller"


def test_nccl_takes_what_published_data_parallel_workers_had_outside_of_torch() -> None:
    several = published_outside_torch("workers")
    assert [(gpu, workers) for gpu, workers, _ in several] == [("A100-40GB", 4), ("H100", 8)]
    for gpu, workers, measured in several:
        told = outside_torch_bytes("ddp", workers, named_gpu(gpu, workers))
        assert 0.85 < told / measured < 1.05


def on_gpus(gpu: str, workers: int, **settings: Any) -> MemoryEstimate:
    config = TrialConfig.model_validate({"micro_batch_size": 1} | settings)
    return estimate_on(config, THREE_B, workers, named_gpu(gpu, workers))


def test_a_communicator_is_on_the_device_and_needed_and_not_torchs() -> None:
    def outside(estimated: MemoryEstimate) -> int:
        assert estimated.reserved_bytes is not None
        return estimated.device_bytes - estimated.reserved_bytes

    alone, both = on_gpus("A100", 1, engine="ddp"), on_gpus("A100", 2, engine="ddp")
    assert outside(both) - outside(alone) == 470 * 2**20
    assert outside(on_gpus("A100", 2)) - outside(both) == 480 * 2**20, "DeepSpeed has a second one"
    assert outside(on_gpus("A100-PCIe", 2)) < outside(on_gpus("A100", 2)) - 800 * 2**20
    assert outside(on_gpus("H100", 8)) - outside(on_gpus("H100", 2)) == 8 * 32 * 2**20, "Hopper's switches sum"
    assert outside(on_gpus("A100", 8)) == outside(on_gpus("A100", 2))
    assert both.needed_bytes - outside(both) == pytest.approx(both.allocated_bytes, rel=0.05)
    # On a device with just what is needed the allocator has what the rest leaves.
    tight = both.within(both.needed_bytes)
    assert (tight.device_bytes, outside(tight)) == (both.needed_bytes, outside(both))


def test_loading_quantised_weights_under_zero3_leaves_room_for_context_and_communicators() -> None:
    config = TrialConfig(precision="nf4", zero_stage=3)
    loading = {workers: loading_bytes_on(config, SEVEN_B, workers, named_gpu("A100", workers)) for workers in (1, 2)}
    assert loading[2] - loading[1] == 2 * 470 * 2**20


def test_a_gpu_of_unknown_links_counts_as_joined_by_nvlink() -> None:
    unknown = replace(named_gpu("T4", 2), interconnect_bytes_per_s=0.0)
    assert outside_torch_bytes("ddp", 2, unknown) > outside_torch_bytes("ddp", 2, named_gpu("T4", 2)) + 400 * 2**20
