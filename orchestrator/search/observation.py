"""What a search learns from its trials: one observation a configuration, out of the records of its repeats."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean

from orchestrator.config.constraint import Constraint
from orchestrator.config.search_space import Settings
from orchestrator.results.constraints import worst_excess
from orchestrator.results.records import MetricPoint, TrialResult, TrialStatus

LEAST_EXCESS = 0.05
"""By how much a trial that ran out of memory, or was refused for it, needs more than there is, at least."""
CONSTRAINTS = ("runs", "fits", "converges")
"""What every configuration must do; a value above 0 is a violation."""
OPEN = frozenset({TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.PREEMPTED, TrialStatus.CANCELLED})


class Standing(StrEnum):
    """How far an observation is."""

    OPEN = "open"
    """It waits or runs: its result is not known yet."""
    WHOLE = "whole"
    """It trained to its last step."""
    PARTIAL = "partial"
    """It was stopped, and is known up to there."""
    REFUSED = "refused"
    """It has no objective, and breaks a constraint."""
    UNKNOWN = "unknown"
    """It failed: nothing is learned of its settings."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One configuration, as far as it is known."""

    number: int
    settings: Settings
    standing: Standing
    curves: tuple[tuple[tuple[int, float], ...], ...] = ()
    """One an objective: step and best value so far, lower is better, mean over the repeats that are known there."""
    constraints: tuple[tuple[str, float], ...] = ()
    """Above 0 is a violation; by how much, where that is known."""

    @property
    def violation(self) -> float:
        """The sum of what is violated; 0 where nothing is."""
        return sum(value for _, value in self.constraints if value > 0)

    @property
    def steps(self) -> int:
        """Optimizer steps that it is known to."""
        return self.curves[0][-1][0] if self.curves and self.curves[0] else 0

    def values_at(self, step: int) -> tuple[float, ...] | None:
        """The objectives after so many steps; None where it did not come so far, or was not looked at before."""
        if not self.curves or any(not curve or not curve[0][0] <= step <= curve[-1][0] for curve in self.curves):
            return None
        return tuple(next(value for at, value in reversed(curve) if at <= step) for curve in self.curves)


@dataclass(frozen=True, slots=True)
class Goal:
    """One objective: a logged metric and which way is better."""

    metric: str
    mode: str

    def of(self, point: MetricPoint) -> float | None:
        """The value, lower is better; None where the point has none or it is no number."""
        return self._lower(getattr(point, self.metric))

    def of_trial(self, record: TrialResult) -> float | None:
        """What it came to, lower is better; None where that is unknown or no number."""
        return self._lower(record.measured(self.metric))

    def _lower(self, value: float | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        return float(value) if self.mode == "min" else -float(value)


Curves = Callable[[str], Sequence[MetricPoint]]
"""A trial's metrics.jsonl."""


def observe(
    records: Iterable[TrialResult],
    goals: Sequence[Goal],
    curves_of: Curves,
    limits: Mapping[str, Constraint] | None = None,
) -> tuple[Observation, ...]:
    """Every suggested configuration, in the order of proposals, without what began in the middle of another trial."""
    repeats: dict[str, list[TrialResult]] = defaultdict(list)
    for record in records:
        if record.suggestion is not None and record.started_from is None:
            repeats[record.configuration_id].append(record)
    proposed = [(group[0].suggestion, group) for group in repeats.values() if group[0].suggestion]
    return tuple(
        combined(suggestion.number, suggestion.settings, group, goals, curves_of, limits or {})
        for suggestion, group in sorted(proposed, key=lambda pair: pair[0].number)
    )


def combined(
    number: int,
    settings: Settings,
    records: Sequence[TrialResult],
    goals: Sequence[Goal],
    curves_of: Curves,
    limits: Mapping[str, Constraint],
) -> Observation:
    """What the repeats of one configuration say together."""
    statuses = {record.status for record in records}
    constraints = constraints_of(records, limits)
    if {TrialStatus.INFEASIBLE, TrialStatus.OUT_OF_MEMORY, TrialStatus.DIVERGED} & statuses:
        return Observation(number, settings, Standing.REFUSED, (), constraints)
    if OPEN & statuses:
        return Observation(number, settings, Standing.OPEN)
    ended = [record for record in records if record.status in (TrialStatus.COMPLETED, TrialStatus.STOPPED)]
    points = [evaluated(curves_of(record.trial_id)) for record in ended]
    curves = tuple(mean_curve([best_so_far(one, goal) for one in points]) for goal in goals)
    if not ended or not all(curves):
        return Observation(number, settings, Standing.UNKNOWN)
    stopped = TrialStatus.STOPPED in {record.status for record in ended}
    return Observation(number, settings, Standing.PARTIAL if stopped else Standing.WHOLE, curves, constraints)


def evaluated(points: Sequence[MetricPoint]) -> list[MetricPoint]:
    """Those at which the trial was evaluated."""
    return [point for point in points if point.eval_loss is not None]


def best_so_far(points: Sequence[MetricPoint], goal: Goal) -> list[tuple[int, float]]:
    """A loss's curve only falls: what counts of a trial is its best evaluation. Memory and speed are as they are."""
    curve: list[tuple[int, float]] = []
    for point in points:
        value = goal.of(point)
        if value is not None:
            is_loss = goal.metric in ("eval_loss", "loss")
            curve.append((point.step, min(value, curve[-1][1]) if curve and is_loss else value))
    return curve


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[tuple[int, float], ...]:
    """The mean over repeats at every step, of those that came so far."""
    known: dict[int, list[float]] = defaultdict(list)
    for curve in curves:
        for step, value in curve:
            known[step].append(value)
    return tuple((step, fmean(known[step])) for step in sorted(known))


def constraints_of(
    records: Sequence[TrialResult], limits: Mapping[str, Constraint] | None = None
) -> tuple[tuple[str, float], ...]:
    """The constraints of all observations are the same ones, so that they can be modelled; the worst repeat counts.

    A refusal by memory, a trial that ran out (a censored observation: more than there is) and one that ran tell the
    logarithm of need over room; every other refusal, and a loss that is no number, are a plain no.
    """
    statuses = {record.status for record in records}
    fits = max(_excess(record) for record in records)
    by_memory = fits > 0 or TrialStatus.OUT_OF_MEMORY in statuses
    refused = TrialStatus.INFEASIBLE in statuses and not by_memory
    values = (1.0 if refused else -1.0, fits, 1.0 if TrialStatus.DIVERGED in statuses else -1.0)
    own = tuple(zip(CONSTRAINTS, values, strict=True))
    more = ((text, worst_excess(limit, records)) for text, limit in (limits or {}).items())
    return own + tuple((text, 0.0 if excess is None else excess) for text, excess in more)


def _excess(record: TrialResult) -> float:
    """Logarithm of what a worker needs over what it may take; 0 where nothing is known of it."""
    memory = record.peak_memory
    known = bool(memory and memory.available_bytes and (memory.measured_bytes or memory.predicted_bytes))
    ratio = 0.0
    if memory and memory.available_bytes and known:
        needed = memory.measured_bytes or memory.predicted_bytes or memory.available_bytes
        ratio = math.log(needed / memory.available_bytes)
    # A refusal that has an estimate is one by memory, though on a GPU the record's leaves context and gaps out.
    if record.status is TrialStatus.OUT_OF_MEMORY or (record.status is TrialStatus.INFEASIBLE and known):
        return max(ratio, LEAST_EXCESS)
    # A trial that ran did fit, whatever was predicted.
    return min(ratio, 0.0)
