"""How a sweep stands, among the metrics that Ray's nodes offer to Prometheus: `ray_orchestrator_*`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from ray.util.metrics import Gauge

from orchestrator.results.records import TrialResult, TrialStatus


class Gauges:
    """Follows the records of one sweep; Ray's own agent carries the values on every few seconds."""

    def __init__(self, sweep: str, records: Iterable[TrialResult], metric: str, mode: Literal["min", "max"]) -> None:
        self._metric, self._sign = metric, 1.0 if mode == "min" else -1.0
        self._statuses: dict[str, TrialStatus] = {}
        self._hours: dict[str, float] = {}
        self._values: dict[str, float] = {}
        self._trials = _gauge("trials", "Trials of the sweep by their status", sweep, "status")
        self._objective = _gauge("best_objective", "The best value of the sweep's objective so far", sweep, "metric")
        self._spent = _gauge("trial_hours", "Hours that trials took which have ended, from launch to end", sweep)
        for record in records:
            self._note(record)
        self._show()

    def track(self, record: TrialResult) -> None:
        """Take note of a trial's newest state."""
        self._note(record)
        self._show()

    def _note(self, record: TrialResult) -> None:
        self._statuses[record.trial_id] = record.status
        self._hours[record.trial_id] = record.timing.total_s / 3600
        value = record.measured(self._metric)
        if value is not None:
            # Each trial's newest: what a running one takes, as its peak memory, may still grow.
            self._values[record.trial_id] = self._sign * value

    def _show(self) -> None:
        counts = Counter(self._statuses.values())
        for status in TrialStatus:
            self._trials.set(counts[status], {"status": status.value})
        self._spent.set(sum(self._hours.values()))
        if self._values:
            self._objective.set(self._sign * min(self._values.values()), {"metric": self._metric})


def _gauge(name: str, about: str, sweep: str, *tags: str) -> Gauge:
    gauge = Gauge(f"orchestrator_{name}", about, ("sweep", *tags))
    gauge.set_default_tags({"sweep": sweep})
    return gauge
