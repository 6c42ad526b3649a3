"""The configuration that DeepSpeed gets, without DeepSpeed."""

from __future__ import annotations

import pytest

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.training.deepspeed_config import ComputeDtype, HalfPrecision, compute_dtype, deepspeed_config, to_json
from tests.training.write_deepspeed_golden import GOLDEN, cases, golden_files


@pytest.mark.parametrize("name", sorted(golden_files()))
def test_the_configuration_is_the_reviewed_one(name: str) -> None:
    assert golden_files()[name] == (GOLDEN / name).read_text(), "run scripts/golden and review the difference"


def test_no_golden_file_is_left_of_a_case_that_is_gone() -> None:
    assert {file.name for file in GOLDEN.glob("*.json")} == set(golden_files())


def test_every_stage_offload_and_precision_has_its_case() -> None:
    assert len(cases()) == 12 * len(Precision)


def test_accumulation_makes_up_for_workers_and_micro_batches() -> None:
    config = TrialConfig(global_batch_size=24, micro_batch_size=2)
    settings = deepspeed_config(config, 3, "fp32", on_gpu=False)
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["train_batch_size"] == 24


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    config = TrialConfig(global_batch_size=8, micro_batch_size=3)
    with pytest.raises(ValueError, match="no multiple"):
        deepspeed_config(config, 1, "fp32", on_gpu=False)


def test_clipping_is_deepspeeds_own_and_no_setting_of_the_optimizer() -> None:
    settings = deepspeed_config(TrialConfig(micro_batch_size=1, max_grad_norm=0.3), 1, "fp32", on_gpu=False)
    assert settings["gradient_clipping"] == 0.3
    assert "max_grad_norm" not in settings["optimizer"]["params"]


AMPERE, VOLTA, AVX2 = HalfPrecision(True, True), HalfPrecision(False, True), HalfPrecision(False, False)


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("fp32", AMPERE, "fp32"),
        ("amp_bf16", AMPERE, "fp32"),
        ("amp_fp16", VOLTA, "fp32"),
        ("bf16", AVX2, "bf16"),
        ("fp16", VOLTA, "fp16"),
        ("nf4", AMPERE, "bf16"),
        ("nf4", VOLTA, "fp16"),
        ("nf4", AVX2, "fp32"),
        ("int8", AMPERE, "bf16"),
        ("int8", VOLTA, "fp16"),
        ("int8", AVX2, "fp32"),
    ],
)
def test_quantised_trials_compute_in_what_the_device_has(
    precision: str, device: HalfPrecision, expected: ComputeDtype
) -> None:
    assert compute_dtype(Precision(precision), device) == expected


def test_the_file_ends_with_a_newline() -> None:
    assert to_json({"a": 1}) == '{\n "a": 1\n}\n'
