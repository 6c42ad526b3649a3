"""Several objectives and constraints: the Pareto front and its hypervolume."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.reporting import quantities
from orchestrator.reporting.statistics import ConfigurationSummary, Costs, front
from orchestrator.results.records import SweepResult, TrialStatus


def value_of(sweep: SweepResult, summary: ConfigurationSummary, metric: str) -> float | None:
    """A configuration's measured value: mean over its completed repeats, of memory the largest."""
    if metric == sweep.objective_metric:
        return summary.objective.mean if summary.objective else None
    if metric == "peak_memory_bytes":
        return summary.peak_memory_bytes
    trials = [trial for trial in sweep.trials if trial.trial_id in summary.trial_ids]
    completed = [trial for trial in trials if trial.status is TrialStatus.COMPLETED]
    values = [value for trial in completed if (value := trial.measured(metric)) is not None]
    return sum(values) / len(values) if values else None


def costs_of(sweep: SweepResult, summaries: Sequence[ConfigurationSummary]) -> dict[str, Costs]:
    """The objectives of each completed configuration that keeps the constraints, lower is better."""
    found = {}
    for summary in summaries:
        values = [value_of(sweep, summary, metric) for metric, _ in sweep.objectives]
        signs = [1.0 if mode == "min" else -1.0 for _, mode in sweep.objectives]
        if summary.objective and not summary.breaks and None not in values:
            pairs = zip(signs, values, strict=True)
            found[summary.configuration_id] = tuple(sign * value for sign, value in pairs if value is not None)
    return found


def on_front(sweep: SweepResult, summaries: Sequence[ConfigurationSummary]) -> list[ConfigurationSummary]:
    """Those that no other beats in all objectives; all of them where there is one objective, or nothing is known."""
    costs = costs_of(sweep, summaries)
    if len(sweep.objectives) < 2 or not costs:
        return list(summaries)
    kept = front(costs)
    return [summary for summary in summaries if summary.configuration_id in kept]


def hypervolume(costs: Sequence[Costs], reference: Costs) -> float:
    """The volume that the points dominate up to `reference`, exactly, slice by slice along the last objective."""
    inside = sorted({c for c in costs if all(a < b for a, b in zip(c, reference, strict=True))}, key=lambda c: c[-1])
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - inside[0][0]
    edges = [cost[-1] for cost in inside] + [reference[-1]]
    return math.fsum(
        (edges[i + 1] - edges[i]) * hypervolume([cost[:-1] for cost in inside[: i + 1]], reference[:-1])
        for i in range(len(inside))
    )


def evidence(
    sweep: SweepResult, summaries: Sequence[ConfigurationSummary], sound: Sequence[ConfigurationSummary]
) -> tuple[str, ...]:
    """What the report says of them; nothing where there is one objective and no constraint.

    Args:
        sweep: its result.
        summaries: all, of which some may break constraints.
        sound: those that compete, whose front is told.
    """
    told = []
    for summary in summaries:
        if summary.breaks:
            told.append(f"{summary.label} does not keep {', '.join(summary.breaks)}, and does not compete.")
    costs = costs_of(sweep, sound)
    if len(sweep.objectives) < 2 or not costs:
        return tuple(told)
    labels = {summary.configuration_id: summary.label for summary in sound}
    names = " and ".join(metric for metric, _ in sweep.objectives)
    on_front = front(costs)
    line = f"Pareto front of {names}: {', '.join(labels[identity] for identity in on_front)}"
    # Where none lies behind the front, the worst values are its own: two of them would always come to nothing.
    if len(on_front) < len(costs):
        worst = tuple(map(max, zip(*costs.values(), strict=True)))
        best = tuple(map(min, zip(*costs.values(), strict=True)))
        box = math.prod(w - b for w, b in zip(worst, best, strict=True))
        share = hypervolume([costs[identity] for identity in on_front], worst) / box if box else 1.0
        line += (
            f"; its hypervolume is {quantities.share(share)} of the box between the best and the worst value of each"
        )
    return (*told, f"{line}.")
