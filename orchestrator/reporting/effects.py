"""What each searched setting does to the objective, to memory and to speed, over trials that differ in nothing else.

What is compared is averaged over the other settings within each seed, and its interval is over the seeds: trials that
differ in their ZeRO stage alone have the same loss, and twice the same is no second opinion. Where no other setting was
searched, values are the configurations that the answer compares, and their differences have its intervals.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from orchestrator.reporting.objectives import on_front
from orchestrator.reporting.statistics import (
    LOSSES,
    Estimate,
    Noise,
    competing,
    estimate,
    noise_of,
    objective_of,
    sign_of,
    spell,
    summaries,
)
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus

MAX_VALUES = 8
BINS = 4
LITTLE = 0.01
"""Share of the objective that is too little to matter, as in the recommendation."""
COSTLIER_UPWARDS = ("rank", "sequence_length", "max_steps")
"""Settings of which more costs more, so that it matters from where on more gains nothing."""
MEASURED = frozenset({TrialStatus.COMPLETED, TrialStatus.STOPPED})
"""What the scheduler stopped has no final objective, but its memory and speed are as good as any."""
Reading = Callable[[TrialResult], float | None]
Cells = Sequence[tuple[int, Mapping[str, float]]]
"""Trials that differ in one setting alone: their repeat, and that setting's value → what was read."""


@dataclass(frozen=True, slots=True)
class SettingValue:
    """What goes with one value of a searched setting, whatever the other settings are."""

    value: str
    objective: Estimate | None
    """Over the completed trials, and without an interval: they differ in their other settings too, which is no noise.
    None where none has completed."""
    difference: Estimate | None
    """To the setting's reference value, over pairs of trials that differ in nothing else; its count and interval are
    those of the seeds, so that one seed alone has none."""
    gain: Estimate | None
    """The same, to the value before: what one step more still brings."""
    memory_ratio: Estimate | None
    """Peak memory over that with the reference value, over such pairs of one micro-batch; stopped trials take part."""
    speed_ratio: Estimate | None
    """Tokens a second, likewise."""


@dataclass(frozen=True, slots=True)
class _Compared:
    """Values of a setting that are the configurations which the answer compares, with their noise."""

    values: frozenset[str]
    noise: Noise

    def told(self, difference: Estimate | None, one: str, other: str) -> Estimate | None:
        """With the answer's own interval of this difference."""
        if difference is None or not {one, other} <= self.values:
            return difference
        return replace(difference, half_width=self.noise.half_width(len(self.values), difference.count))


@dataclass(frozen=True, slots=True)
class Levelling:
    """Whether more of a setting still helps."""

    state: Literal["levelled_off", "still_gains", "undecided"]
    value: str
    """The smallest that no higher one beats by 1 %, with 95 % confidence; else the last that was looked at."""
    further: str
    """The higher value with the best objective."""
    gain: Estimate
    """By how much `further` is better than `value`."""


@dataclass(frozen=True, slots=True)
class Effect:
    """The main effect of one searched setting."""

    setting: str
    values: tuple[SettingValue, ...]
    reference: str
    """The first value of which there are pairs: what the others are compared with."""
    levelling: Levelling | None
    """Of a setting of which more costs more; None where no two of its values can be compared with their noise, and of
    `sequence_length` where the objective is a loss, whose tokens are others at each length."""


def main_effects(sweep: SweepResult) -> tuple[Effect, ...]:
    """One effect for every searched setting that has at least two values among the trials that were measured."""
    measured = measured_trials(sweep)
    found = [_effect(sweep, name, measured) for name in sweep.searched] if measured else []
    return tuple(effect for effect in found if len(effect.values) > 1)


def measured_trials(sweep: SweepResult) -> list[TrialResult]:
    """Those that can be compared; what began in the middle of another trial differs in more than its settings."""
    return [trial for trial in sweep.trials if trial.status in MEASURED and not trial.started_from]


def _effect(sweep: SweepResult, name: str, measured: Sequence[TrialResult]) -> Effect:
    def final(trial: TrialResult) -> float | None:
        return objective_of(sweep, trial) if trial.status is TrialStatus.COMPLETED else None

    group_of = grouping([getattr(trial.config, name) for trial in measured])
    # Numbers by size; words as the sweep has them, whose first one is what the others are compared with.
    found = {spell(v): v for t in measured for v in [getattr(t.config, name)]}
    ordered = sorted(found.values(), key=lambda value: sort_key(value)[:2])
    order = list(dict.fromkeys(map(group_of, ordered)))
    objectives: dict[str, list[float]] = {group: [] for group in order}
    for trial in measured:
        if (value := final(trial)) is not None:
            objectives[group_of(getattr(trial.config, name))].append(value)
    places = places_of(name, sweep.searched, measured, group_of)
    cells = _cells(places, measured, final)
    at_one_size = _of_one_micro_batch(name, places, measured)
    memory, speed = (_cells(at_one_size, measured, reading) for reading in (_memory, _speed))
    paired = {group for found in (cells, memory, speed) for _, cell in found if len(cell) > 1 for group in cell}
    reference = next((group for group in order if group in paired), order[0])
    compared = _compared(sweep, name)
    values = tuple(
        SettingValue(
            value=group,
            objective=Estimate(fmean(own), None, len(own)) if (own := objectives[group]) else None,
            difference=_difference(cells, group, reference, compared) if group != reference else None,
            gain=_difference(cells, group, order[place - 1], compared) if place else None,
            memory_ratio=_ratio(memory, group, reference) if group != reference else None,
            speed_ratio=_ratio(speed, group, reference) if group != reference else None,
        )
        for place, group in enumerate(order)
    )
    # Later tokens of a row are easier to predict: a loss falls with the length, however well a model was trained.
    levels_off = name in COSTLIER_UPWARDS and not (name == "sequence_length" and sweep.objective_metric in LOSSES)
    levels = _levelling(cells, order, sign_of(sweep), compared) if levels_off and group_of is spell else None
    return Effect(name, values, reference, levels)


def _compared(sweep: SweepResult, name: str) -> _Compared | None:
    """None where another setting was searched too, so that an effect is a mean over it, or nothing was repeated."""
    completed = [trial.config for trial in sweep.trials if trial.status is TrialStatus.COMPLETED]
    if any(len({spell(getattr(config, n)) for config in completed}) > 1 for n in sweep.searched if n != name):
        return None
    contenders = on_front(sweep, competing(summaries(sweep))[0])
    noise = noise_of({summary.configuration_id: summary.objective_by_repeat for summary in contenders})
    values = frozenset(spell(dict(summary.settings)[name]) for summary in contenders)
    return _Compared(values, noise) if noise and len(values) == len(contenders) else None


def _memory(trial: TrialResult) -> float | None:
    return trial.peak_memory.measured_bytes if trial.peak_memory else None


def _speed(trial: TrialResult) -> float | None:
    return trial.tokens_per_s


def sort_key(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then words by the alphabet."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, float(value), "") if is_number else (1, 0.0, spell(value))


def grouping(values: Sequence[Any]) -> Callable[[Any], str]:
    """How values are put together: each its own group, or quarters where a range was sampled."""
    distinct = sorted({v for v in values if isinstance(v, int | float) and not isinstance(v, bool)})
    if len(set(map(spell, values))) <= MAX_VALUES or len(distinct) <= MAX_VALUES:
        return spell
    starts = [len(distinct) * i // BINS for i in range(BINS)]
    bins = [distinct[low:high] for low, high in zip(starts, [*starts[1:], None], strict=True)]

    def quarter(value: Any) -> str:
        if not isinstance(value, int | float):
            return spell(value)
        own = next((values for values in reversed(bins) if value >= values[0]), bins[0])
        return f"{_short(own[0])} to {_short(own[-1])}"

    return quarter


def _short(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def places_of(
    name: str, searched: Sequence[str], measured: Sequence[TrialResult], group_of: Callable[[Any], str]
) -> Sequence[tuple[tuple[Any, ...], str]]:
    """Of each trial what it has besides the setting, its repeat and all other searched settings; and its value."""
    others = [other for other in searched if other != name]
    return [
        (
            (trial.repeat, *(spell(getattr(trial.config, other)) for other in others)),
            group_of(getattr(trial.config, name)),
        )
        for trial in measured
    ]


def _of_one_micro_batch(
    name: str, places: Sequence[tuple[tuple[Any, ...], str]], measured: Sequence[TrialResult]
) -> Sequence[tuple[tuple[Any, ...], str]]:
    """The same places, apart where the micro-batch is another: chosen to fit, it changes memory and speed by itself.

    Of the loss it changes nothing, since accumulation makes up for it.
    """
    if name == "micro_batch_size":
        return places
    return [
        ((*place, trial.config.micro_batch_size), group) for (place, group), trial in zip(places, measured, strict=True)
    ]


def _cells(places: Sequence[tuple[tuple[Any, ...], str]], measured: Sequence[TrialResult], reading: Reading) -> Cells:
    cells: dict[tuple[Any, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (cell, group), trial in zip(places, measured, strict=True):
        if (value := reading(trial)) is not None and math.isfinite(value):
            cells[cell][group].append(value)
    return [(place[0], {group: fmean(read) for group, read in cell.items()}) for place, cell in cells.items()]


def _difference(cells: Cells, group: str, reference: str, compared: _Compared | None) -> Estimate | None:
    pairs = ((r, cell[group] - cell[reference]) for r, cell in cells if group in cell and reference in cell)
    found = over_seeds(pairs)
    return compared.told(found, group, reference) if compared else found


def _ratio(cells: Cells, group: str, reference: str) -> Estimate | None:
    return over_seeds((r, cell[group] / cell[reference]) for r, cell in cells if group in cell and cell.get(reference))


def over_seeds(pairs: Iterable[tuple[int, float]]) -> Estimate | None:
    """The mean of (repeat, value) with its interval, both over the repeats."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for repeat, value in pairs:
        by_seed[repeat].append(value)
    return estimate([fmean(values) for values in by_seed.values()]) if by_seed else None


def _levelling(cells: Cells, order: Sequence[str], sign: int, compared: _Compared | None) -> Levelling | None:
    middle = abs(fmean(value for _, cell in cells for value in cell.values())) if cells else 0.0
    last = None
    for place, value in enumerate(order[:-1]):
        gains = {further: _gain(cells, further, value, sign, compared) for further in order[place + 1 :]}
        known = {further: gain for further, gain in gains.items() if gain and gain.half_width is not None}
        if not known:
            continue
        further, gain = max(known.items(), key=lambda entry: entry[1].mean)
        most = max(g.mean + (g.half_width or 0.0) for g in known.values())
        if len(known) == len(gains) and most <= LITTLE * middle:
            return Levelling("levelled_off", value, further, gain)
        last = Levelling("still_gains" if gain.mean > (gain.half_width or 0.0) else "undecided", value, further, gain)
    return last


def _gain(cells: Cells, further: str, value: str, sign: int, compared: _Compared | None) -> Estimate | None:
    found = _difference(cells, further, value, compared)
    return Estimate(-sign * found.mean, found.half_width, found.count) if found else None
