"""How a sweep stands, among the metrics that Ray's nodes offer to Prometheus: `ray_orchestrator_*`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from ray.util.metrics import Gauge

from orchestrator.config.constraint import parse
from orchestrator.config.sweep_config import SweepConfig
from orchestrator.results.constraints import is_broken
from orchestrator.results.records import TrialResult, TrialStatus


class Gauges:
    """Follows the records of one sweep; Ray's own agent carries the values on every few seconds."""

    def __init__(self, sweep: SweepConfig, records: Iterable[TrialResult]) -> None:
        self._metric, self._sign = sweep.primary.metric, 1.0 if sweep.primary.mode == "min" else -1.0
        self._constraints = [parse(text) for text in sweep.constraints]
        # A sweep of thousands is not counted anew at each change of one of them.
        self._statuses: dict[str, TrialStatus] = {}
        self._counts: Counter[TrialStatus] = Counter()
        self._hours: dict[str, float] = {}
        self._all_hours = 0.0
        self._values: dict[str, float] = {}
        self._best: float | None = None
        self._trials = _gauge("trials", "Trials of the sweep by their status", sweep.name, "status")
        best = "The best value of the sweep's objective so far, of trials that keep its constraints"
        self._objective = _gauge("best_objective", best, sweep.name, "metric")
        self._spent = _gauge("trial_hours", "Hours that trials took which have ended, from launch to end", sweep.name)
        for record in records:
            self._note(record)
        self._show()

    def track(self, record: TrialResult) -> None:
        """Take note of a trial's newest state."""
        self._note(record)
        self._show()

    def _note(self, record: TrialResult) -> None:
        trial_id, hours = record.trial_id, record.timing.total_s / 3600
        self._counts[record.status] += 1
        if status := self._statuses.get(trial_id):
            self._counts[status] -= 1
        self._all_hours += hours - self._hours.get(trial_id, 0.0)
        self._statuses[trial_id], self._hours[trial_id] = record.status, hours
        if (value := record.measured(self._metric)) is None:
            return
        # Each trial's newest: what a running one takes, as its peak memory, may still grow.
        before, new = self._values.pop(trial_id, None), self._sign * value
        if not any(is_broken(constraint, [record]) for constraint in self._constraints):
            self._values[trial_id] = new
            if self._best is None or new <= self._best:
                self._best = new
                return
        if before == self._best:
            self._best = min(self._values.values(), default=None)

    def _show(self) -> None:
        for status in TrialStatus:
            self._trials.set(self._counts[status], {"status": status.value})
        self._spent.set(self._all_hours)
        best = math.nan if self._best is None else self._sign * self._best
        self._objective.set(best, {"metric": self._metric})


def _gauge(name: str, about: str, sweep: str, *tags: str) -> Gauge:
    gauge = Gauge(f"orchestrator_{name}", about, ("sweep", *tags))
    gauge.set_default_tags({"sweep": sweep})
    return gauge
