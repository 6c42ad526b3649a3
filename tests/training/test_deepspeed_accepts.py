"""Every configuration is one that DeepSpeed itself accepts."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from tests.training.write_deepspeed_golden import cases


@pytest.mark.parametrize("name", sorted(cases()))
def test_deepspeeds_own_classes_accept_the_configuration(name: str) -> None:
    # Of one worker, since DeepSpeed asks the process group for more, and here is none.
    settings = cases(workers=1)[name]
    accepted = DeepSpeedConfig(settings)
    assert accepted.gradient_accumulation_steps == 4
    assert accepted.zero_config.stage == settings["zero_optimization"]["stage"]
    assert not accepted.timers_config.enabled
    assert _precision(accepted) == _precision_asked(name)


def _precision(accepted: Any) -> str:
    if accepted.torch_autocast_enabled:
        return f"autocast {accepted.torch_autocast_dtype}"
    if accepted.bfloat16_config.enabled:
        return "bf16"
    return "fp16" if accepted.float16_config.enabled else "fp32"


def _precision_asked(name: str) -> str:
    precision = name.rpartition("-")[2]
    by_name = {"amp_bf16": "autocast torch.bfloat16", "amp_fp16": "autocast torch.float16"}
    return by_name.get(precision, {"int8": "bf16", "nf4": "bf16"}.get(precision, precision))
