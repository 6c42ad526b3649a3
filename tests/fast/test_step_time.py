from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.hardware import GPUS, Hardware, named_gpu
from orchestrator.planning.memory import trainable_parameters
from orchestrator.planning.model_shape import ModelShape, shape_of
from orchestrator.planning.step_time import SPREAD, UNMEASURED, Placement, Range, step_flops, step_seconds
from tests.fast.cases import CPU, LLAMA_2_7B, SMOLLM2_135M

SEVEN_B = shape_of(LLAMA_2_7B)
SMALL = shape_of(SMOLLM2_135M)
MIXTURE = shape_of(
    LLAMA_2_7B
    | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_key_value_heads": 8}
    | {"intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2}
)


def seconds(
    hardware: Hardware,
    shape: ModelShape = SEVEN_B,
    workers: int = 1,
    correction: Range = UNMEASURED,
    gpu_shared_by: int = 1,
    nodes: int = 1,
    **settings: Any,
) -> float:
    config = TrialConfig.model_validate({"micro_batch_size": 1, "precision": "bf16"} | settings)
    placement = Placement(workers, 2, gpu_shared_by, nodes)
    return step_seconds(config, shape, hardware, placement, correction).expected


def test_the_step_that_was_measured_on_two_cores_lies_within_the_range() -> None:
    predicted = seconds(CPU, SMALL, precision="fp32", sequence_length=128, global_batch_size=4, micro_batch_size=4)
    assert predicted / SPREAD < 2.3 < predicted * SPREAD


def test_a_small_micro_batch_waits_for_memory_or_for_its_kernels_and_a_large_one_for_arithmetic() -> None:
    h100 = named_gpu("H100", 1)
    one_by_one = seconds(h100, SMALL, sequence_length=64, global_batch_size=64)
    at_once = seconds(h100, SMALL, sequence_length=64, global_batch_size=64, micro_batch_size=64)
    assert one_by_one > 10 * at_once
    long = {"sequence_length": 4096, "global_batch_size": 8}
    assert seconds(h100, **long) == seconds(h100, **long, micro_batch_size=8)


def test_trials_that_share_a_gpu_take_turns_on_it_and_start_their_kernels_at_once() -> None:
    a100, long = named_gpu("A100", 1), {"sequence_length": 2048}
    assert seconds(a100, gpu_shared_by=7, **long) == pytest.approx(7 * seconds(a100, **long))
    short = {"sequence_length": 64, "global_batch_size": 1}
    assert seconds(a100, SMALL, gpu_shared_by=2, **short) == seconds(a100, SMALL, **short)
    assert seconds(a100, SMALL, gpu_shared_by=1000, **short) > seconds(a100, SMALL, **short)


def test_gathered_and_offloaded_weights_go_over_a_link_that_may_be_slow() -> None:
    nvlink, pcie = named_gpu("A100", 4), named_gpu("L40S", 4)
    for gpu, least in ((nvlink, 1.0), (pcie, 1.2)):
        assert seconds(gpu, workers=4, zero_stage=3) > least * seconds(gpu, workers=4, zero_stage=2)
    whole = {"zero_stage": 3, "offload": "optimizer_and_parameters"}
    assert seconds(nvlink, workers=4, **whole) > seconds(nvlink, workers=4, zero_stage=3)


def test_workers_on_several_nodes_wait_for_the_network() -> None:
    spread = {"workers": 16, "zero_stage": 3, "global_batch_size": 16}
    gathered_bytes = 2 * 2 * SEVEN_B.linear_parameters * 15 / 16
    more = seconds(named_gpu("A100", 16), nodes=2, **spread) - seconds(named_gpu("A100", 16), **spread)
    assert more == pytest.approx(gathered_bytes * (1 / 12.5e9 - 1 / 300e9), rel=0.01)
    assert seconds(named_gpu("A100", 16), nodes=2) == seconds(named_gpu("A100", 16))


def test_offloaded_weights_take_twice_as_long_to_come_to_a_gpu_in_an_older_slot() -> None:
    def coming(gpu: str) -> float:
        settings = {"precision": "fp16", "zero_stage": 3, "global_batch_size": 1}
        fewer, all_ = (
            seconds(named_gpu(gpu, 1), **settings, offload=offload)
            for offload in ("optimizer", "optimizer_and_parameters")
        )
        return all_ - fewer

    assert coming("T4") == pytest.approx(coming("V100")) == pytest.approx(25 / 12 * coming("A100"))


@pytest.mark.parametrize("rank", [8, "full"])
def test_attention_takes_its_forward_pass_three_times_whatever_is_trained(rank: object) -> None:
    """Its scores have no weights, so that none of their gradients is left out where weights are frozen."""

    def flops_of_scores(**settings: Any) -> float:
        one, two = (
            step_flops(TrialConfig(rank=rank, global_batch_size=4096 // n, sequence_length=n, **settings), SEVEN_B)
            for n in (1024, 2048)
        )
        return (two - one) / 4096 / (4 * 1024 * 4096 * 32)

    assert flops_of_scores() == pytest.approx(3)
    assert flops_of_scores(gradient_checkpointing=True) == pytest.approx(4)


def test_an_adapter_of_a_high_rank_takes_its_time() -> None:
    def flops(rank: int) -> float:
        return step_flops(TrialConfig(rank=rank, sequence_length=64), shape_of(SMOLLM2_135M))

    # docs/studies/lora_rank.csv, within each repeat: 1.00 to 1.03 times as long, and 1.26 to 1.31.
    assert flops(32) / flops(8) == pytest.approx(1.03, abs=0.02)
    assert flops(256) / flops(8) == pytest.approx(1.28, abs=0.07)


def test_offloaded_weights_are_stepped_by_the_cores_of_each_worker_and_adapters_in_no_time() -> None:
    full = {"rank": "full", "zero_stage": 2, "global_batch_size": 4}
    h200 = named_gpu("H200", 4)

    def stepping(workers: int = 1, **settings: Any) -> float:
        settings = {**full, **settings}
        copied = 2 * 2 * trainable_parameters(TrialConfig(**settings), SEVEN_B) / workers / 25e9
        kept = seconds(h200, workers=workers, **settings)
        return seconds(h200, workers=workers, **settings, offload="optimizer") - kept - copied

    # `seconds` gives each worker two cores.
    assert stepping() == pytest.approx(6.738e9 * 0.7e-9 / 2, rel=0.01)
    assert stepping(workers=4) == pytest.approx(stepping() / 4)
    assert stepping(optimizer="sgd") < 0.5 * stepping()
    assert stepping(rank=16) < 0.2


def test_the_experts_of_a_quantised_mixture_are_read_as_wide_as_they_are_stored() -> None:
    a100, short = named_gpu("A100", 1), {"sequence_length": 16, "global_batch_size": 1, "precision": "nf4"}
    reading = seconds(a100, MIXTURE, **short)
    experts = sum(matrix.parameters for matrix in MIXTURE.matrices if matrix.is_expert)
    assert experts > 0.9 * MIXTURE.linear_parameters
    assert reading == pytest.approx(2 * (2 * experts + 0.52 * (MIXTURE.linear_parameters - experts)) / 2039e9, rel=0.01)


def test_quantised_weights_cost_time() -> None:
    gpu = named_gpu("A100", 1)
    assert seconds(gpu) < seconds(gpu, precision="nf4") < seconds(gpu, precision="int8")


def test_what_was_measured_corrects_what_is_predicted() -> None:
    gpu = named_gpu("A100", 1)
    assert seconds(gpu, correction=Range(1.2, 1.5, 2.0)) == pytest.approx(1.5 * seconds(gpu))


@pytest.mark.parametrize("name", GPUS)
def test_every_known_gpu_has_a_finite_time(name: str) -> None:
    assert 0 < seconds(named_gpu(name, 8), workers=8, zero_stage=3) < 3600
