"""Several objectives and constraints: the Pareto front and its hypervolume."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from orchestrator.config.constraint import parse
from orchestrator.reporting import quantities
from orchestrator.reporting.statistics import ConfigurationSummary, Costs, front, pareto_front, sign_of
from orchestrator.results.constraints import worst_excess
from orchestrator.results.records import SweepResult, TrialResult, TrialStatus

REFERENCE = 1.1
"""Up to where an objective counts in the hypervolume: its best value is 0, the worst of all that competes 1. A tenth of
the range past the worst, since at the worst itself both ends of a front would count for nothing. Source: Ishibuchi,
Akedo and Nojima 2011, A Many-Objective Test Problem for Visually Examining Diversity Maintenance Behavior in a Decision
Space, as BoTorch's `infer_reference_point` has it."""
MOST_ON_FRONT = 4096
"""Over 2 to the number of objectives, so many configurations on the front have a hypervolume: it takes two seconds at
most there (512 in three objectives, 32 in seven), and minutes soon after."""
MOST_PERCENT = 1_000_000
"""More is told as over this: nobody counts such digits."""
NAMES = {"peak_memory_bytes": "peak memory", "tokens_per_s": "tokens a second"}


@dataclass(frozen=True, slots=True)
class ParetoFront:
    """The competing configurations that no other one of them beats or equals in all metrics at once."""

    metrics: tuple[str, ...]
    """The objectives; where there is one, it, peak memory and tokens a second."""
    configuration_ids: tuple[str, ...]
    reference: tuple[float, ...] | None
    """Of each metric, up to where the hypervolume counts, in its own unit; None where there is one objective."""
    hypervolume: float | None
    """What the front dominates of the box between the best value of each metric and the reference, as a share of it;
    None where there is one objective, nothing is on the front, or more than `MOST_ON_FRONT` allows."""

    @property
    def words(self) -> str:
        """`eval_loss, peak memory and tokens a second`."""
        *others, last = (NAMES.get(metric, metric) for metric in self.metrics)
        return f"{', '.join(others)} and {last}"


def by_id(sweep: SweepResult) -> dict[str, TrialResult]:
    """The trials, to be found by a summary's ids: there may be thousands of both."""
    return {trial.trial_id: trial for trial in sweep.trials}


def value_of(
    sweep: SweepResult, summary: ConfigurationSummary, metric: str, trials: Mapping[str, TrialResult]
) -> float | None:
    """A configuration's measured value: mean over its completed repeats, of memory the largest.

    trials: the sweep's, `by_id`.
    """
    if metric == sweep.objective_metric:
        return summary.objective.mean if summary.objective else None
    measured = {
        "peak_memory_bytes": summary.peak_memory_bytes,
        "tokens_per_s": summary.tokens_per_s,
        "step_time_s": summary.step_time_s,
    }
    if metric in measured:
        return measured[metric]
    values = [value for trial in _completed(summary, trials) if (value := trial.measured(metric)) is not None]
    return sum(values) / len(values) if values else None


def _completed(summary: ConfigurationSummary, trials: Mapping[str, TrialResult]) -> list[TrialResult]:
    return [t for trial_id in summary.trial_ids if (t := trials[trial_id]).status is TrialStatus.COMPLETED]


def nearest_words(sweep: SweepResult, completed: Sequence[ConfigurationSummary]) -> str:
    """` rank=8 comes nearest, at 104 % of the bound in peak_memory_bytes <= 24GiB.`, the one it breaks worst."""
    trials = by_id(sweep)
    broken = [(*_worst(summary, trials), summary.label) for summary in completed if summary.breaks]
    if not broken:
        return ""
    # Of those that come as near, the first has the best objective.
    excess, text, label = min(broken, key=lambda entry: entry[0])
    logarithm = excess if parse(text).is_upper else -excess
    return f" {label} comes nearest, at {_percent(logarithm)} % of the bound in {text}."


def _percent(logarithm: float) -> str:
    """Of a ratio, of which only the logarithm need be a number that can be held."""
    if logarithm > math.log(MOST_PERCENT / 100):
        return f"over {MOST_PERCENT:,}"
    percent = 100 * math.exp(logarithm)
    return f"{percent:.0f}" if percent >= 100 else f"{percent:.2g}"


def _worst(summary: ConfigurationSummary, trials: Mapping[str, TrialResult]) -> tuple[float, str]:
    repeats = _completed(summary, trials)
    return max((worst_excess(parse(text), repeats) or 0.0, text) for text in summary.breaks)


def costs_of(sweep: SweepResult, summaries: Sequence[ConfigurationSummary]) -> dict[str, Costs]:
    """The objectives of each completed configuration that keeps the constraints, lower is better."""
    found, trials = {}, by_id(sweep)
    for summary in summaries:
        values = [value_of(sweep, summary, metric, trials) for metric, _ in sweep.objectives]
        if summary.objective and not summary.breaks and None not in values:
            pairs = zip(_signs(sweep), values, strict=True)
            found[summary.configuration_id] = tuple(sign * value for sign, value in pairs if value is not None)
    return found


def _signs(sweep: SweepResult) -> list[float]:
    """Times these, lower objectives are better ones."""
    return [1.0 if mode == "min" else -1.0 for _, mode in sweep.objectives]


def on_front(sweep: SweepResult, sound: Sequence[ConfigurationSummary]) -> list[ConfigurationSummary]:
    """Those that no other beats in all objectives; all of them where there is one objective, or nothing is known."""
    kept = front(costs_of(sweep, sound))
    if len(sweep.objectives) < 2 or not kept:
        return list(sound)
    return [summary for summary in sound if summary.configuration_id in kept]


def front_of(sweep: SweepResult, sound: Sequence[ConfigurationSummary]) -> ParetoFront:
    """The Pareto front of those that compete."""
    if len(sweep.objectives) < 2:
        usual = tuple(dict.fromkeys((sweep.objective_metric, *NAMES)))
        return ParetoFront(usual, pareto_front(sound, sign_of(sweep)), None, None)
    costs, metrics = costs_of(sweep, sound), tuple(metric for metric, _ in sweep.objectives)
    if not costs:
        return ParetoFront(metrics, (), None, None)
    kept = front(costs)
    each = list(zip(*costs.values(), strict=True))
    best, ranges = [min(values) for values in each], [max(values) - min(values) for values in each]
    # Where all are alike in an objective it has no range, and every point counts to all of its reference.
    points = tuple(
        tuple((value - b) / r if r else 0.0 for value, b, r in zip(costs[one], best, ranges, strict=True))
        for one in kept
    )
    dominated = _share_of_box(points) if len(points) * 2 ** len(metrics) <= MOST_ON_FRONT else None
    reference = tuple(sign * (b + REFERENCE * r) for sign, b, r in zip(_signs(sweep), best, ranges, strict=True))
    return ParetoFront(metrics, kept, reference, dominated)


@lru_cache(maxsize=1)
def _share_of_box(points: tuple[Costs, ...]) -> float:
    """The evidence tells it, and the report's own front too."""
    objectives = len(points[0])
    return hypervolume(points, (REFERENCE,) * objectives) / REFERENCE**objectives


def hypervolume(costs: Sequence[Costs], reference: Costs) -> float:
    """The volume that the points dominate up to `reference`, exactly: of each what those after it leave of its own.

    Source: While, Bradstreet and Barone 2012, A Fast Way of Calculating Exact Hypervolumes (WFG).
    """
    inside = [cost for cost in costs if all(a < b for a, b in zip(cost, reference, strict=True))]
    kept = front({cost: cost for cost in inside})[::-1]
    return math.fsum(
        math.prod(b - a for a, b in zip(cost, reference, strict=True))
        - hypervolume([tuple(map(max, cost, other)) for other in kept[place + 1 :]], reference)
        for place, cost in enumerate(kept)
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
    told = [
        f"Left out, since they do not keep {text}: {quantities.some(labels)}."
        for text in sweep.constraints
        if (labels := [summary.label for summary in summaries if summary.objective and text in summary.breaks])
    ]
    found = front_of(sweep, sound)
    if found.reference is None:
        return tuple(told)
    names = {summary.configuration_id: summary.label for summary in sound}
    line = f"Pareto front of {found.words}: {quantities.some([names[one] for one in found.configuration_ids])}"
    # Where none lies behind the front, the worst values are its own: of two on it, it would always be the same.
    if found.hypervolume is None:
        line += "; its hypervolume is left out, since of so many in so many objectives it takes minutes"
    elif len(found.configuration_ids) < len(costs_of(sweep, sound)):
        line += (
            f"; its hypervolume is {quantities.share(found.hypervolume)} of the box between the best value of each and "
            "a tenth of its range past the worst"
        )
    return (*told, f"{line}.")
