"""What `search.warm_start` teaches an adaptive search beside what to try first, and what is said of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.constraint import Constraint
from orchestrator.config.local_path import local_path
from orchestrator.config.sweep_config import DataConfig, SweepConfig
from orchestrator.config.sweep_file import load
from orchestrator.errors import InputError
from orchestrator.results.folders import SweepFolder
from orchestrator.results.records import SweepResult
from orchestrator.results.storage import read_sweep
from orchestrator.search.observation import Goal, Observation, Standing, evaluated
from orchestrator.search.warm_start import LIGHTER, learned, of_another_model


@dataclass(frozen=True, slots=True)
class Lesson:
    """Observations of another sweep."""

    observations: tuple[Observation, ...] = ()
    is_of_another_model: bool = False
    told: str | None = None
    """For the person who asked for it."""

    def beside(self, known: Sequence[Observation]) -> tuple[Observation, ...]:
        """As the search may take them, which knows so much by itself."""
        return of_another_model(self.observations, known) if self.is_of_another_model else self.observations


def lesson_of(sweep: SweepConfig, data_hash: str, goals: Sequence[Goal], limits: dict[str, Constraint]) -> Lesson:
    """Read the folder that the sweep file names; without one there is nothing to learn."""
    if sweep.search.warm_start is None:
        return Lesson()
    folder = SweepFolder(local_path(sweep.search.warm_start))
    earlier, _ = read_sweep(folder)
    is_other = earlier.model != sweep.model
    if why := _incomparable(sweep, folder, earlier, data_hash, is_other=is_other):
        return Lesson(told=f"warm start: the best of {folder.shown} are tried first, and no more is learned: {why}")
    # Of a curve no more is kept than its evaluations: thousands of trials may have thousands of steps.
    curves = functools.cache(lambda trial_id: evaluated(folder.trial(trial_id).read_metrics()))
    found = learned(earlier.trials, sweep.domains, sweep.base, goals, curves, limits)
    known = tuple(one for one in found if one.standing not in (Standing.OPEN, Standing.UNKNOWN))
    lighter = f", of which one of {LIGHTER} counts: it trained {earlier.model}" if is_other else ""
    told = f"warm start: {len(known)} configurations of {folder.shown} are known{lighter}"
    return Lesson(known, is_other, told)


def _incomparable(
    sweep: SweepConfig, folder: SweepFolder, earlier: SweepResult, data_hash: str, *, is_other: bool
) -> str | None:
    """Why its losses say nothing of ours; another model may cut the same text into other tokens."""
    if earlier.data_hash != data_hash and not (is_other and _data_of(folder) == sweep.data):
        return "its data is other"
    if earlier.objective_metric != sweep.primary.metric or len(sweep.training_objectives) > 1:
        return "its objective is other, or one of several here"
    return None


def _data_of(folder: SweepFolder) -> DataConfig | None:
    """What it read; None where its sweep file is lost or damaged."""
    try:
        return load(folder.sweep_file).data
    except InputError:
        return None
