"""By which settings a population's member came to its end: its answer is a schedule, not one configuration."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.trial_config import CHANGEABLE
from orchestrator.reporting.statistics import spell
from orchestrator.results.records import SweepResult, TrialResult


def lineage_words(sweep: SweepResult, trial: TrialResult | None) -> str | None:
    """`It came there by learning_rate=0.01 (3f2a-0), from step 40 on learning_rate=0.012 (9c1b-0).`

    None for a trial that began at the first step.
    """
    if trial is None or trial.started_from is None:
        return None
    names = [name for name in sweep.searched if name in CHANGEABLE]
    told = []
    for one in reversed(list(ancestors(sweep, trial))):
        since = f"from step {one.started_from.step} on " if one.started_from else ""
        told.append(f"{since}{' '.join(f'{n}={spell(getattr(one.config, n))}' for n in names)} ({one.trial_id})")
    return f"It came there by {', '.join(told)}: a configuration alone does not make it again."


def ancestors(sweep: SweepResult, trial: TrialResult) -> Iterator[TrialResult]:
    """The trial, the one whose checkpoint it began with, and so on."""
    trials = {one.trial_id: one for one in sweep.trials}
    found: TrialResult | None = trial
    while found:
        yield found
        found = trials.pop(found.started_from.trial_id, None) if found.started_from else None
