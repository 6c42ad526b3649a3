"""What Prometheus is shown of a sweep."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("ray")

from orchestrator.config.sweep_config import SweepConfig
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
    shown = Gauges(
        SweepConfig.model_validate(
            {
                "name": "sweep",
                "model": "builtin:tiny-llama",
                "data": {"train": "builtin:python-docs"},
                "objective": {"metric": "peak_memory_bytes", "mode": mode},
                "constraints": ["peak_memory_bytes <= 15"],
            }
        ),
        records.values(),
    )
    assert math.isnan(made["best_objective"].values["peak_memory_bytes"])
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
        kept = [value for value in values.values() if value is not None and value <= 15]
        best = (min if mode == "min" else max)(kept, default=math.nan)
        assert made["best_objective"].values == pytest.approx({"peak_memory_bytes": best}, nan_ok=True)
        assert made["trial_hours"].values[""] == pytest.approx(hours)
