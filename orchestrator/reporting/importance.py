"""How much of the objective's variation each searched setting is answerable for, over the whole space."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.reporting.effects import MAX_VALUES
from orchestrator.reporting.statistics import objective_of, spell
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus

MIN_CONFIGURATIONS = 8
"""Repeats do not count: of two configurations the forest would share what tells them apart by chance."""
TREES, DEPTH = 32, 6
"""Grown to the last leaf, the trees of a thousand trials take a minute and say the same to a percent."""
WIDE = 10
"""A range whose ends are so many times apart is looked at by its logarithm."""


def importances(sweep: SweepResult) -> Mapping[str, float]:
    """Share of the explained variance by setting, the largest first; empty where one setting or few configurations ran.

    Settings that always changed together have one share, named `rank and learning_rate`: nothing tells them apart.

    fANOVA on a random forest over the completed trials, so that settings count which were not crossed evenly, as after
    a random or adaptive search. Source: Hutter, Hoos and Leyton-Brown 2014, as optuna has it.
    """
    completed = [
        (trial, value)
        for trial in sweep.trials
        if trial.status is TrialStatus.COMPLETED and (value := objective_of(sweep, trial)) is not None
    ]
    if any(trial.started_from for trial, _ in completed):
        # What a member came to is its whole line's doing, not its last settings'.
        return {}
    together = _changed_together(sweep.searched, [trial for trial, _ in completed])
    is_few = len({trial.configuration_id for trial, _ in completed}) < MIN_CONFIGURATIONS
    if is_few or len(together) < 2 or len({value for _, value in completed}) < 2:
        return {}
    shares = _fanova(list(together), completed)
    return {" and ".join(together[name]): share for name, share in shares.items()}


def _changed_together(names: Sequence[str], trials: Sequence[TrialResult]) -> dict[str, list[str]]:
    """The settings that changed, each with those of which every value went with one of its own."""
    found: dict[Any, list[str]] = defaultdict(list)
    for name in names:
        values = [getattr(trial.config, name) for trial in trials]
        if len(set(map(spell, values))) > 1:
            found[_pattern(values)].append(name)
    return {alike[0]: alike for alike in found.values()}


def _pattern(values: Sequence[Any]) -> tuple[bool, tuple[int, ...]]:
    """Of two settings the same where one tells the other: by their order, either way, where a range was drawn from,
    since of two drawn apart each value is met once."""
    if _is_range(values):
        places = {value: place for place, value in enumerate(sorted(set(values)))}
        order = tuple(places[value] for value in values)
        return True, min(order, tuple(len(places) - 1 - place for place in order))
    first: dict[str, int] = {}
    return False, tuple(first.setdefault(spell(value), len(first)) for value in values)


def _fanova(names: Sequence[str], completed: Sequence[tuple[TrialResult, float]]) -> dict[str, float]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    columns = {name: [getattr(trial.config, name) for trial, _ in completed] for name in names}
    is_range = {name: _is_range(values) for name, values in columns.items()}
    distributions = {n: _distribution(values, is_range=is_range[n]) for n, values in columns.items()}
    study = optuna.create_study()
    for place, (_, value) in enumerate(completed):
        params = {n: values[place] if is_range[n] else spell(values[place]) for n, values in columns.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=TREES, max_depth=DEPTH, seed=0))
    return {name: float(share) for name, share in found.items()}


def _is_range(values: Sequence[Any]) -> bool:
    is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return is_numeric and len(set(values)) > MAX_VALUES


def _distribution(values: Sequence[Any], *, is_range: bool) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not is_range:
        return CategoricalDistribution(sorted(set(map(spell, values))))
    low, high = float(min(values)), float(max(values))
    return FloatDistribution(low, high, log=low > 0 and high >= WIDE * low)
