"""What Prometheus is shown of a sweep."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("ray")

from orchestrator.results.records import TrialResult, TrialStatus
from orchestrator.sweep import gauges
from orchestrator.sweep.gauges import Gauges
from tests.made_up_sweep import made_up_trial


class Shown:
    """A gauge of Ray's."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[" ".join((tags or {}).values())] = value


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_gauges_show_each_trial_as_it_stands_now(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    made: dict[str, Shown] = {}
    monkeypatch.setattr(gauges, "_gauge", lambda name, *_: made.setdefault(name, Shown()))
    rng = random.Random(0)
    records = {trial.trial_id: trial for trial in (made_up_trial({"rank": rank}) for rank in range(1, 9))}
    values = {one.trial_id: one.measured("peak_memory_bytes") for one in records.values()}
    shown = Gauges("sweep", records.values(), "peak_memory_bytes", mode)
    for _ in range(300):
        rank, size_bytes = rng.randint(1, 12), rng.randint(1, 20)
        status = rng.choice([TrialStatus.PENDING, TrialStatus.RUNNING, TrialStatus.COMPLETED])
        record: TrialResult = made_up_trial({"rank": rank}, status=status, memory_bytes=size_bytes)
        records[record.trial_id] = record
        shown.track(record)
        counts = Counter(one.status.value for one in records.values())
        assert made["trials"].values == {status.value: counts[status.value] for status in TrialStatus}
        hours = sum(one.timing.total_s for one in records.values()) / 3600
        if (value := record.measured("peak_memory_bytes")) is not None:
            values[record.trial_id] = value
        best = (min if mode == "min" else max)(value for value in values.values() if value is not None)
        assert made["best_objective"].values == {"peak_memory_bytes": best}
        assert made["trial_hours"].values[""] == pytest.approx(hours)
