"""The DeepSpeed configurations that are reviewed like code: one for each stage, offload and precision."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, get_args

from orchestrator.config.trial_config import Precision, TrialConfig
from orchestrator.training.deepspeed_config import HalfPrecision, compute_dtype, deepspeed_config, to_json

GOLDEN = Path(__file__).parents[1] / "golden" / "deepspeed"
OFFLOADS = get_args(TrialConfig.model_fields["offload"].annotation)
STAGES = get_args(TrialConfig.model_fields["zero_stage"].annotation)
_GPU = HalfPrecision(bf16=True, fp16=True)


def cases(workers: int = 2) -> dict[str, dict[str, Any]]:
    """By name, the settings for Ampere GPUs; those that planning refuses too."""
    return {
        f"zero{stage}-{offload}-{precision}": deepspeed_config(
            TrialConfig(
                zero_stage=stage, offload=offload, precision=precision, global_batch_size=16, micro_batch_size=4
            ),
            workers=workers,
            dtype=compute_dtype(precision, _GPU),
            on_gpu=True,
        )
        for stage, offload, precision in itertools.product(STAGES, OFFLOADS, Precision)
    }


def golden_files() -> dict[str, str]:
    """The content of each file in tests/golden/deepspeed: those that planning allows."""
    return {f"{name}.json": to_json(settings) for name, settings in cases().items() if _is_allowed(name)}


def _is_allowed(name: str) -> bool:
    stage, offload, _ = name.split("-")
    lowest = {"none": 0, "optimizer": 2, "optimizer_and_parameters": 3}
    return int(stage.removeprefix("zero")) >= lowest[offload]


def write() -> None:
    """Rewrite all files."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for file in GOLDEN.glob("*.json"):
        file.unlink()
    for name, text in golden_files().items():
        (GOLDEN / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
