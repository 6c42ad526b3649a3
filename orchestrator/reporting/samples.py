"""What trained models wrote and scored, as the report shows it: a prompt's answers side by side."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.reporting.statistics import label
from orchestrator.results.evaluation import Evaluation, evaluation_of
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult


@dataclass(frozen=True, slots=True)
class Samples:
    """All evaluations of a sweep, in the order of its trials."""

    names: tuple[str, ...]
    """Of the trials that were evaluated."""
    answers: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    """Each prompt with (name, completion) of every trial that was asked it."""
    scores: tuple[tuple[str, tuple[float | None, ...]], ...]
    """Each `TASK/METRIC` with the trials' values, in the order of `names`."""


def samples_of(sweep: SweepResult, folder: SweepFolder) -> Samples | None:
    """Read them; None where no trial was evaluated."""
    found: dict[str, Evaluation] = {}
    for trial in sweep.trials:
        evaluation = evaluation_of(trial, folder) if trial.adapter else None
        if evaluation:
            repeated = f", repeat {trial.repeat}" if trial.repeat else ""
            found[f"{label(trial, sweep.searched) or trial.trial_id}{repeated}"] = evaluation
    if not found:
        return None
    prompts = dict.fromkeys(sample.prompt for evaluation in found.values() for sample in evaluation.samples)
    metrics = dict.fromkeys(metric for evaluation in found.values() for metric in evaluation.scores)
    answers = tuple(
        (
            prompt,
            tuple((name, s.completion) for name, e in found.items() for s in e.samples if s.prompt == prompt),
        )
        for prompt in prompts
    )
    scores = tuple((metric, tuple(e.scores.get(metric) for e in found.values())) for metric in metrics)
    return Samples(tuple(found), answers, scores)
