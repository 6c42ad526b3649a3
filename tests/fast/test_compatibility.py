from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.config.trial_config import Precision
from orchestrator.planning.compatibility import NOTES, REFUSALS, Case, notes, refusals
from tests.fast.cases import A100, CPU, CPU_WITH_HALF, V100, case

WITHOUT_FLASH = replace(A100, has_flash_attention=False)
WITHOUT_BITSANDBYTES = replace(CPU, has_bitsandbytes=False)
# Each rule with a case that it refuses and the nearest one that runs.
RULES: list[tuple[str, Case, Case]] = [
    ("fp16_needs_hardware", case(CPU, precision="fp16"), case(CPU_WITH_HALF, precision="fp16")),
    ("bf16_needs_ampere", case(V100, precision="bf16"), case(A100, precision="bf16")),
    (
        "flash_attention_needs_ampere",
        case(V100, precision="fp16", attention="flash_attention_2"),
        case(A100, precision="fp16", attention="flash_attention_2"),
    ),
    (
        "flash_attention_needs_ampere",
        case(A100, precision="fp32", attention="flash_attention_2"),
        case(A100, precision="amp_bf16", attention="flash_attention_2"),
    ),
    (
        "flash_attention_needs_ampere",
        case(WITHOUT_FLASH, attention="flash_attention_2"),
        case(A100, attention="flash_attention_2"),
    ),
    (
        "offload_needs_zero",
        case(A100, zero_stage=1, offload="optimizer"),
        case(A100, zero_stage=2, offload="optimizer"),
    ),
    ("offload_needs_zero", case(A100, engine="ddp", offload="optimizer"), case(A100, engine="ddp")),
    (
        "offload_needs_zero",
        case(A100, zero_stage=2, offload="optimizer_and_parameters"),
        case(A100, zero_stage=3, offload="optimizer_and_parameters"),
    ),
    ("int8_excludes_zero3", case(A100, precision="int8", zero_stage=3), case(A100, precision="nf4", zero_stage=3)),
    ("quantisation_needs_an_adapter", case(A100, precision="nf4", rank="full"), case(A100, precision="nf4", rank=8)),
    ("quantisation_needs_bitsandbytes", case(WITHOUT_BITSANDBYTES, precision="nf4"), case(CPU, precision="nf4")),
    (
        "eight_bit_adamw_needs_a_gpu",
        case(CPU, precision="fp32", optimizer="adamw_8bit"),
        case(A100, optimizer="adamw_8bit"),
    ),
    (
        "pure_fp16_excludes_plain_ddp",
        case(A100, precision="fp16", engine="ddp", rank="full"),
        case(A100, precision="fp16", engine="ddp", rank=8),
    ),
    ("adapters_only_options", case(A100, rank="full", dora=True), case(A100, rank=8, dora=True)),
    ("targets_must_exist", case(A100, target_modules=["q_prj"]), case(A100, target_modules=["q_proj"])),
    (
        "global_batch_must_divide",
        case(A100, workers=3, global_batch_size=16),
        case(A100, workers=4, global_batch_size=16),
    ),
    (
        "global_batch_must_divide",
        case(A100, global_batch_size=16, micro_batch_size=6),
        case(A100, global_batch_size=16, micro_batch_size=8),
    ),
    ("sequence_must_fit_the_model", case(A100, sequence_length=4097), case(A100, sequence_length=4096)),
]


@pytest.mark.parametrize(("rule", "refused", "allowed"), RULES, ids=[f"{i}-{rule[0]}" for i, rule in enumerate(RULES)])
def test_a_rule_refuses_its_case_with_a_remedy_and_not_its_nearest_neighbour(
    rule: str, refused: Case, allowed: Case
) -> None:
    reasons = refusals(refused)
    assert len(reasons) == 1
    assert reasons[0] == next(r for r in REFUSALS if r.__name__ == rule)(refused)
    assert re.search(r"\b(use|raise|lower|install|change|name|leave)\b", reasons[0])
    assert refusals(allowed) == ()


def test_every_rule_has_a_case_here_and_names_its_source() -> None:
    assert {rule.__name__ for rule in REFUSALS} == {name for name, _, _ in RULES}
    assert all(rule.__doc__ for rule in (*REFUSALS, *NOTES))


def test_a_missing_target_module_names_those_that_the_model_has() -> None:
    (reason,) = refusals(case(A100, target_modules=["q_prj"]))
    assert "did you mean q_proj" in reason
    assert all(name in reason for name in ("k_proj", "down_proj"))


@pytest.mark.parametrize(
    ("noted", "told"),
    [
        (case(A100, workers=1, zero_stage=3), "shards nothing"),
        (case(CPU, precision="bf16"), "emulated"),
        (case(CPU, precision="nf4"), "computes in fp32"),
        (case(V100, precision="nf4"), "computes in fp16"),
        (case(A100, warmup_steps=100, max_steps=100), "warmup_steps"),
    ],
)
def test_what_runs_and_should_be_known_is_a_note(noted: Case, told: str) -> None:
    assert refusals(noted) == ()
    assert told in " ".join(notes(noted))


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("engine", [{"engine": "ddp"}, *({"zero_stage": stage} for stage in range(4))])
def test_on_an_ampere_gpu_every_precision_runs_on_every_engine_but_int8_under_zero3(
    precision: Precision, engine: dict[str, Any]
) -> None:
    refused = bool(refusals(case(A100, workers=2, precision=precision, **engine)))
    assert refused == (precision is Precision.INT8 and engine.get("zero_stage") == 3)
