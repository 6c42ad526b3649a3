"""A trial's record at its end: its workers may have come further than the last that they told the sweep.

One that is stopped trains on until it hears of it, and may be evaluated and keep a better adapter meanwhile.
"""

from __future__ import annotations

from typing import Any

from orchestrator.config.sweep_config import ObjectiveConfig
from orchestrator.results.folders import TrialFolder
from orchestrator.results.records import MetricPoint, TrialResult


def as_left_on_disk(record: TrialResult, folder: TrialFolder, best_by: ObjectiveConfig) -> TrialResult:
    """The record with the steps and evaluations that are in the folder; best_by: what the adapter was kept by.

    Where an attempt began again and did not come as far, the best of the one before stays: its adapter is still there.
    """
    later = folder.points_after(record.last.step if record.last else 0)
    last = later[-1] if later else folder.last_point()
    if last is None:
        return record
    update: dict[str, Any] = {"last": last, "steps": last.step, "tokens": last.tokens}
    if last.step_time_s is not None:
        update |= {"tokens_per_s": last.tokens_per_s, "step_time_s": last.step_time_s}
    best = _best(record.best, later, best_by)
    if best is not record.best:
        update |= {"best": best, "adapter": "adapter"}
    peaks_bytes = [point.peak_memory_bytes for point in later if point.peak_memory_bytes is not None]
    if record.peak_memory and peaks_bytes:
        measured_bytes = max([record.peak_memory.measured_bytes or 0, *peaks_bytes])
        update["peak_memory"] = record.peak_memory.model_copy(update={"measured_bytes": measured_bytes})
    return record.model_copy(update=update)


def _best(best: MetricPoint | None, later: tuple[MetricPoint, ...], best_by: ObjectiveConfig) -> MetricPoint | None:
    for point in later:
        if point.improves(best, best_by.metric, best_by.mode):
            best = point
    return best
