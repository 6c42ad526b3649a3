"""Shapes, machines and made-up records that tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.config.search_space import Trial
from orchestrator.config.trial_config import TrialConfig
from orchestrator.planning.compatibility import Case
from orchestrator.planning.hardware import Hardware, named_gpu
from orchestrator.planning.model_shape import shape_of
from orchestrator.planning.planned_trial import PlannedTrial
from orchestrator.results.records import StartedFrom, Suggestion, TrialResult, TrialStatus

LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LLAMA_32_3B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
CPU = Hardware("cpu", 0, 2, 1, 24 * 2**30, has_bf16=False, has_fp16=False, has_bitsandbytes=True)
CPU_WITH_HALF = Hardware("cpu", 0, 2, 1, 24 * 2**30, has_bf16=True, has_fp16=True, has_bitsandbytes=True)
A100 = named_gpu("A100", 8)
V100 = replace(named_gpu("V100", 8), torch_knows_volta=True)


def case(hardware: Hardware, workers: int = 1, **settings: Any) -> Case:
    return Case(TrialConfig.model_validate(settings), shape_of(LLAMA_2_7B), hardware, workers)


def planned(trial: Trial, *reasons: str) -> PlannedTrial:
    """The trial as the plan has it, refused where there are reasons."""
    return PlannedTrial(reasons=reasons, **{name: getattr(trial, name) for name in Trial.__dataclass_fields__})


def new_record(planned: PlannedTrial, suggestion: Suggestion | None, parent: StartedFrom | None) -> TrialResult:
    """The record that a planned trial begins with."""
    return TrialResult(
        trial_id=planned.trial_id,
        configuration_id=planned.configuration_id,
        status=TrialStatus.INFEASIBLE if planned.reasons else TrialStatus.PENDING,
        reason="; ".join(planned.reasons) or None,
        config=planned.config,
        repeat=planned.repeat,
        seed=0,
        suggestion=suggestion,
        started_from=parent,
    )
