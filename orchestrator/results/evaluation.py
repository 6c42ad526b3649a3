"""What a trained model wrote and scored: evaluation.json in a trial's folder."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.config.sweep_config import EvaluateConfig
from orchestrator.results.files import read_record, write_atomically
from orchestrator.results.folders import SweepFolder, TrialFolder
from orchestrator.results.records import TrialResult


class _Record(BaseModel):
    # A score may be no number, and must be read back as that.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings", use_attribute_docstrings=True)


class Sample(_Record):
    """One answer."""

    prompt: str
    completion: str


class Evaluation(_Record):
    """All that `evaluate:` asked of one trial's best adapter."""

    schema_version: Literal[1] = 1
    asked: EvaluateConfig
    samples: tuple[Sample, ...] = ()
    scores: dict[str, float] = {}
    """By `TASK/METRIC`, as lm-eval has them."""
    seconds: float
    """That generating and scoring took, loading left out."""
    best_ms: int | None = None
    """`time_ms` of the point whose adapter it was; None where an older release evaluated it."""


def read_evaluation(trial: TrialFolder) -> Evaluation | None:
    """What the trial's folder holds; None where there is none, or none that can be read."""
    try:
        return Evaluation.model_validate_json(read_record(trial.evaluation))
    except (OSError, ValidationError):
        return None


def evaluation_of(trial: TrialResult, folder: SweepFolder) -> Evaluation | None:
    """What its best adapter wrote and scored; None where that is not known.

    A trial that went on, or was run again, may have another adapter than the one that was evaluated.
    """
    found = read_evaluation(folder.trial(trial.trial_id))
    best_ms = trial.best.time_ms if trial.best else None
    return found if found and found.best_ms in (None, best_ms) else None


def write_evaluation(trial: TrialFolder, evaluation: Evaluation) -> None:
    """Write a trial's evaluation.json."""
    write_atomically(trial.evaluation, evaluation.model_dump_json(indent=1) + "\n")
