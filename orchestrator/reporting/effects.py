"""What each searched setting does to the objective, over all completed trials."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from orchestrator.reporting.statistics import Estimate, estimate, objective_of, spell
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus

MAX_VALUES = 8
BINS = 4


@dataclass(frozen=True, slots=True)
class SettingValue:
    """What goes with one value of a searched setting, whatever the other settings are."""

    value: str
    objective: Estimate
    difference: Estimate | None
    """To the setting's first value, over pairs of trials that differ in nothing else, seed included."""
    gain: Estimate | None
    """The same, to the value before: what one step more still brings."""


@dataclass(frozen=True, slots=True)
class Effect:
    """The main effect of one searched setting."""

    setting: str
    values: tuple[SettingValue, ...]
    explained: float | None
    """Share of the objective's variance over completed trials that the setting alone accounts for (eta squared)."""


def main_effects(sweep: SweepResult) -> tuple[Effect, ...]:
    """One effect for every searched setting that has at least two values among the completed trials."""
    completed = {
        trial.trial_id: (trial, value)
        for trial in sweep.trials
        if trial.status is TrialStatus.COMPLETED and (value := objective_of(sweep, trial)) is not None
    }
    found = [_effect(name, sweep.searched, list(completed.values())) for name in sweep.searched]
    return tuple(effect for effect in found if len(effect.values) > 1)


def _effect(name: str, searched: Sequence[str], completed: Sequence[tuple[TrialResult, float]]) -> Effect:
    group_of = grouping([getattr(trial.config, name) for trial, _ in completed])
    groups: dict[str, list[float]] = defaultdict(list)
    for trial, value in completed:
        groups[group_of(getattr(trial.config, name))].append(value)
    order = sorted(groups, key=lambda group: _first(group, group_of, name, completed))
    cells = _cells(name, searched, completed, group_of)
    values = tuple(
        SettingValue(
            value=group,
            objective=estimate(groups[group]),
            difference=_difference(cells, group, order[0]) if place else None,
            gain=_difference(cells, group, order[place - 1]) if place else None,
        )
        for place, group in enumerate(order)
    )
    return Effect(name, values, _explained(list(groups.values())))


def _first(
    group: str, group_of: Callable[[Any], str], name: str, completed: Sequence[tuple[TrialResult, float]]
) -> tuple[int, float, str]:
    members = [value for trial, _ in completed if group_of(value := getattr(trial.config, name)) == group]
    return sort_key(min(members, key=sort_key))


def sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then words by the alphabet."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if is_number else (1, 0.0, spell(value))


def grouping(values: Sequence[Any]) -> Callable[[Any], str]:
    """How values are put together: each its own group, or quarters where a range was sampled."""
    distinct = sorted({v for v in values if isinstance(v, int | float) and not isinstance(v, bool)})
    if len(set(map(spell, values))) <= MAX_VALUES or len(distinct) <= MAX_VALUES:
        return spell
    edges = [distinct[len(distinct) * i // BINS] for i in range(BINS)] + [distinct[-1]]

    def quarter(value: Any) -> str:
        if not isinstance(value, int | float):
            return spell(value)
        place = max(i for i in range(BINS) if value >= edges[i] or i == 0)
        return f"{spell(edges[place])} to {spell(edges[place + 1])}"

    return quarter


def _cells(
    name: str,
    searched: Sequence[str],
    completed: Sequence[tuple[TrialResult, float]],
    group_of: Callable[[Any], str],
) -> Sequence[Mapping[str, float]]:
    """Trials that are alike in every other searched setting and the seed: the setting's value → objective."""
    others = [other for other in searched if other != name]
    cells: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for trial, value in completed:
        cell = (trial.repeat, *(spell(getattr(trial.config, other)) for other in others))
        cells[cell][group_of(getattr(trial.config, name))] = value
    return list(cells.values())


def _difference(cells: Sequence[Mapping[str, float]], group: str, reference: str) -> Estimate | None:
    pairs = [cell[group] - cell[reference] for cell in cells if group in cell and reference in cell]
    return estimate(pairs) if pairs else None


def _explained(groups: Sequence[Sequence[float]]) -> float | None:
    everything = [value for group in groups for value in group]
    if len(everything) <= len(groups):
        return None
    middle = fmean(everything)
    total = sum((value - middle) ** 2 for value in everything)
    between = sum(len(group) * (fmean(group) - middle) ** 2 for group in groups)
    return between / total if total > 0 else None
