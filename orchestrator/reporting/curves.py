"""What the evaluations of a sweep say over their steps: mean curves, their bands, and where they have levelled off."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from orchestrator.reporting.effects import grouping, measured_trials, places_of, sort_key
from orchestrator.reporting.statistics import ConfigurationSummary, Estimate, estimate, t_quantile
from orchestrator.results.records import MetricPoint, SweepResult, TrialStatus

MAX_POINTS = 200
LEVEL = 0.005
LEVEL_OF_FALL = 0.1
"""A curve that has fallen little since its first evaluation is level only where it stays within so much of that fall:
of 1.7 % in all, 0.5 % in the last quarter is no end, since a straight line falls by a quarter there."""
LEAST_LEVEL = 0.001
"""Noise of evaluations, in which a curve that hardly fell at all still ends."""
LAST_PART = 0.25
MIN_EVALUATIONS = 4
Curve = tuple[MetricPoint, ...]
Losses = dict[int, dict[str, dict[int, float]]]
"""Step → configuration → repeat → eval_loss."""


@dataclass(frozen=True, slots=True)
class MeanCurve:
    """A configuration's eval_loss, mean over its repeats; or that of all with one value of a setting."""

    label: str
    settings: tuple[tuple[str, Any], ...]
    points: tuple[tuple[float, float], ...]
    """(step, mean)."""
    band: tuple[tuple[float, float, float], ...]
    """(step, low, high)."""
    repeats: int


@dataclass(frozen=True, slots=True)
class Plateau:
    """Whether more steps would still help a configuration."""

    levelled_off_at_step: int | None
    """From there to the end eval_loss stays within 0.5 % of its last value, and within a tenth of what it fell by in
    all (but for 0.1 %, which may be noise); None where that is true of less than the last quarter of the steps."""
    late_fall: Estimate
    """By how much eval_loss still fell at the end: from `late_step` to `last_step`."""
    late_step: int
    """The last that was evaluated before the last quarter of the steps began, or as it did."""
    last_step: int


def mean_curves(
    sweep: SweepResult, found: Sequence[ConfigurationSummary], curves: Mapping[str, Curve]
) -> tuple[MeanCurve, ...]:
    """One curve for every configuration that was evaluated, in the order of `found`."""
    losses = _losses((t.configuration_id, t.repeat, curves.get(t.trial_id, ())) for t in sweep.trials)
    drawn = (_mean_curve(summary.configuration_id, summary.label, summary.settings, losses) for summary in found)
    return tuple(curve for curve in drawn if curve.points)


def value_curves(sweep: SweepResult, name: str, curves: Mapping[str, Curve]) -> tuple[tuple[MeanCurve, ...], int]:
    """One curve for every value of a searched setting, seed by seed: the mean over those combinations of the other
    settings that completed with every value; and how many these are.

    A scheduler stops the worst of each value: over whatever is left, the value of which the most were stopped would
    look the best. Stopped trials themselves would make the mean jump where they end. Empty where there is no such
    combination, as after a search that drew its values.
    """
    ran = [trial for trial in sweep.trials if trial.steps]
    group_of = grouping([getattr(trial.config, name) for trial in sweep.trials])
    groups = {group_of(getattr(trial.config, name)) for trial in ran}
    completed = [trial for trial in ran if trial.status is TrialStatus.COMPLETED]
    places = places_of(name, sweep.searched, completed, group_of)
    values_at: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for place, group in places:
        values_at[place].add(group)
    matched = [(t, group) for t, (place, group) in zip(completed, places, strict=True) if values_at[place] == groups]
    first: dict[str, Any] = {}
    for trial, group in sorted(matched, key=lambda entry: sort_key(getattr(entry[0].config, name))):
        first.setdefault(group, getattr(trial.config, name))
    losses = _losses((group, trial.repeat, curves.get(trial.trial_id, ())) for trial, group in matched)
    drawn = (_mean_curve(group, f"{name}={group}", ((name, value),), losses) for group, value in first.items())
    combinations = {tuple(others) for (_, *others), values in values_at.items() if values == groups}
    return tuple(curve for curve in drawn if curve.points), len(combinations)


def _losses(found: Iterable[tuple[str, int, Curve]]) -> Losses:
    read: dict[int, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for group, repeat, curve in found:
        for point in evaluations(curve):
            read[point.step][group][repeat].append(point.eval_loss or 0.0)
    return {
        step: {group: {r: fmean(values) for r, values in by_repeat.items()} for group, by_repeat in groups.items()}
        for step, groups in read.items()
    }


def evaluations(curve: Curve) -> Curve:
    """The points that were evaluated, with a result that is a number."""
    return tuple(point for point in curve if point.eval_loss is not None and math.isfinite(point.eval_loss))


def losses_where_both_were(
    sweep: SweepResult, curves: Mapping[str, Curve], name: str, value: str, reference: str
) -> tuple[tuple[int, float, float], ...]:
    """(repeat, eval_loss with one value of a setting, with another) of each pair of trials that differ in nothing else.

    At the last step that both were evaluated at: stopped trials take part, which have no final objective.
    """
    measured = measured_trials(sweep)
    places = places_of(name, sweep.searched, measured, grouping([getattr(trial.config, name) for trial in measured]))
    cells: dict[tuple[Any, ...], dict[str, dict[int, float]]] = defaultdict(dict)
    for (place, group), trial in zip(places, measured, strict=True):
        evaluated = evaluations(curves.get(trial.trial_id, ()))
        cells[place][group] = {point.step: point.eval_loss or 0.0 for point in evaluated}
    found = []
    for (repeat, *_), cell in cells.items():
        one, other = cell.get(value, {}), cell.get(reference, {})
        if shared := one.keys() & other.keys():
            found.append((repeat, one[max(shared)], other[max(shared)]))
    return tuple(found)


def _mean_curve(identity: str, label: str, settings: tuple[tuple[str, Any], ...], losses: Losses) -> MeanCurve:
    own = {step: cells[identity] for step, cells in losses.items() if identity in cells}
    repeats = len({repeat for by_repeat in own.values() for repeat in by_repeat})
    # Where some repeats ended early the mean would jump: it is drawn as far as most of them came.
    steps = [step for step in sorted(own) if 2 * len(own[step]) > repeats]
    steps = steps[:: -max(1, math.ceil(len(steps) / MAX_POINTS))][::-1]
    points = tuple((float(step), fmean(own[step].values())) for step in steps)
    band = tuple(_band_at(step, own[step], losses[step]) for step in steps if len(own[step]) > 1)
    return MeanCurve(label, settings, points, band, repeats)


def _band_at(
    step: int, own: Mapping[int, float], everyone: Mapping[str, Mapping[int, float]]
) -> tuple[float, float, float]:
    """The mean's 95 % interval by Student's t, once the shift that a seed gives all configurations alike is taken out.

    Curves are compared seed by seed, as everywhere in the report. Source: Cousineau 2005 with Morey's correction, 2008.
    """
    complete = [by_repeat for by_repeat in everyone.values() if by_repeat.keys() >= own.keys()]
    shifts = dict.fromkeys(own, 0.0)
    inflation = 1.0
    if len(complete) > 1:
        shifts = {repeat: fmean(by_repeat[repeat] for by_repeat in complete) for repeat in own}
        inflation = len(complete) / (len(complete) - 1)
    levelled = [value - shifts[repeat] for repeat, value in own.items()]
    middle = fmean(own.values())
    half_width = t_quantile(1, len(own) - 1) * math.sqrt(variance(levelled) * inflation / len(own))
    return float(step), middle - half_width, middle + half_width


def plateaus(sweep: SweepResult, curves: Mapping[str, Curve]) -> dict[str, Plateau]:
    """By configuration, over its completed repeats; left out where there are too few evaluations to tell."""
    groups: dict[str, list[Curve]] = defaultdict(list)
    for trial in sweep.trials:
        evaluated = evaluations(curves.get(trial.trial_id, ()))
        if trial.status is TrialStatus.COMPLETED and len(evaluated) >= MIN_EVALUATIONS:
            groups[trial.configuration_id].append(evaluated)
    found = {identity: _plateau(group) for identity, group in groups.items()}
    return {identity: level for identity, level in found.items() if level}


def _plateau(group: Sequence[Curve]) -> Plateau | None:
    losses = [{point.step: point.eval_loss or 0.0 for point in curve} for curve in group]
    shared = sorted(set.intersection(*map(set, losses)))
    if len(shared) < MIN_EVALUATIONS:
        return None
    last = shared[-1]
    quarter = last * (1 - LAST_PART)
    late = max([step for step in shared if step <= quarter], default=shared[0])
    levelled = [_levelled_off_at(curve, curve[-1].eval_loss or 0.0, quarter) for curve in group]
    known = [step for step in levelled if step is not None]
    falls = estimate([by_step[late] - by_step[last] for by_step in losses])
    return Plateau(max(known) if len(known) == len(levelled) else None, falls, late, last)


def _levelled_off_at(curve: Curve, last: float, late_step: float) -> int | None:
    fall = (curve[0].eval_loss or 0.0) - last
    width = min(LEVEL * abs(last), max(LEAST_LEVEL * abs(last), LEVEL_OF_FALL * fall))
    away = [i for i, point in enumerate(curve) if abs((point.eval_loss or 0.0) - last) > width]
    first = curve[away[-1] + 1 if away else 0].step
    return first if first <= late_step else None
