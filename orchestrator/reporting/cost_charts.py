"""The report's figures of what configurations cost: memory by part, speed, and what a better objective takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.planning.plan import SweepPlan
from orchestrator.reporting import quantities
from orchestrator.reporting.charts import Figure, Key
from orchestrator.reporting.noise import ONE_RUN_SPEED
from orchestrator.reporting.objectives import ParetoFront, by_id, value_of
from orchestrator.reporting.plot import Axis, Bar, Dot, Part, bar_plot, xy_plot
from orchestrator.reporting.statistics import ConfigurationSummary, are_the_same
from orchestrator.results.records import SweepResult, TrialStatus

MAX_BARS = 24
MAX_LABELS = 8
NEVER_RAN = frozenset({TrialStatus.PENDING, TrialStatus.INFEASIBLE, TrialStatus.CANCELLED})
PART_STYLES = {
    "weights": "s0",
    "adapter": "s4",
    "gradients": "s3",
    "optimizer": "s1",
    "activations": "s2",
    "logits": "s5",
    "communication": "s6",
    "framework": "s7",
    "process": "rest",
}
"""What a worker's memory is made of, in the order of its bar; `process` is a CPU's, before any model."""
Parts = Mapping[str, Mapping[str, int]]
"""Configuration → part → bytes."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What an objective is drawn against."""

    title: str
    axis: Axis
    of: Callable[[ConfigurationSummary], float | None]


def parts_of(plan: SweepPlan | None, found: Sequence[ConfigurationSummary]) -> dict[str, dict[str, int]]:
    """The predicted parts of each configuration's peak, which add up to what was predicted for it."""
    planned = {trial.configuration_id: trial.memory.parts for trial in plan.trials if trial.memory} if plan else {}
    parts = {}
    for summary in found:
        if summary.configuration_id in planned and summary.predicted_memory_bytes:
            by_name = planned[summary.configuration_id].by_name()
            rest = summary.predicted_memory_bytes - sum(by_name.values())
            # A micro-batch that was halved since has other parts than the plan tells.
            if rest >= 0:
                parts[summary.configuration_id] = {n: b for n, b in (*by_name.items(), ("process", rest)) if b > 0}
    return parts


def memory_chart(found: Sequence[ConfigurationSummary], parts: Parts, kind: str) -> Figure | None:
    """Peak memory of one worker by configuration: predicted by part as bars, measured as marks."""
    known = [s for s in found if s.peak_memory_bytes or s.predicted_memory_bytes][:MAX_BARS]
    if not known:
        return None
    largest = max(max(s.peak_memory_bytes or 0, s.predicted_memory_bytes or 0) for s in known)
    unit, name = memory_unit(largest)
    bars = [
        Bar(
            s.label,
            (s.predicted_memory_bytes or 0) / unit,
            _measured_words(s),
            "whole",
            s.peak_memory_bytes / unit if s.peak_memory_bytes else None,
            tuple(
                Part(size / unit, PART_STYLES[part], f"{part} {quantities.memory(size)}")
                for part, size in parts.get(s.configuration_id, {}).items()
            ),
        )
        for s in known
    ]
    what = "torch's max_memory_allocated" if kind == "cuda_allocated" else "the process's peak resident memory"
    words = (
        "Bars: the peak of one worker as predicted before launch, by what holds it. Marks: as measured, the largest of "
        f"the repeats ({what}). {_shown(known, found)}."
    )
    ratios = [
        s.predicted_memory_bytes / s.peak_memory_bytes
        for s in known
        if s.predicted_memory_bytes and s.peak_memory_bytes
    ]
    if ratios:
        told = " to ".join(dict.fromkeys(f"{end(ratios):.2f}" for end in (min, max)))
        words += f" Predicted is {told} times what was measured."
    drawn = {part for s in known for part in parts.get(s.configuration_id, {})}
    keys = [Key(f"{style} bar", part) for part, style in PART_STYLES.items() if part in drawn]
    if not drawn:
        keys.insert(0, Key("whole bar", "predicted"))
    elif any(s.configuration_id not in parts for s in known if s.predicted_memory_bytes):
        keys.insert(0, Key("whole bar", "predicted, without parts"))
        words += (
            " The plan, which has the parts, was made before the start: it knows none of what a search proposed later, "
            "or of a micro-batch that was halved since."
        )
    svg = bar_plot("Peak memory", words, bars, Axis(f"peak memory of a worker ({name})"))
    return Figure("Peak memory by part, predicted and measured", svg, (*keys, Key("mark", "measured")), words)


def _measured_words(summary: ConfigurationSummary) -> str:
    if summary.peak_memory_bytes:
        return f"{quantities.memory(summary.peak_memory_bytes)} measured"
    if summary.counts.keys() <= NEVER_RAN:
        return "not run"
    return "not measured yet" if summary.counts.get(TrialStatus.RUNNING) else "not measured"


def _shown(known: Sequence[ConfigurationSummary], found: Sequence[ConfigurationSummary]) -> str:
    return (
        f"The best {len(known)} of {len(found)} configurations" if len(known) < len(found) else "Best objective first"
    )


def speed_chart(found: Sequence[ConfigurationSummary]) -> Figure | None:
    """Tokens a second by configuration."""
    known = [s for s in found if s.tokens_per_s][:MAX_BARS]
    if not known:
        return None
    bars = [
        Bar(
            s.label,
            s.tokens_per_s or 0.0,
            f"{quantities.rate(s.tokens_per_s)} ({quantities.step_time(s.step_time_s)})",
            "s2",
        )
        for s in known
    ]
    fastest, slowest = max(known, key=lambda s: s.tokens_per_s or 0), min(known, key=lambda s: s.tokens_per_s or 0)
    words = f"Tokens a second over all workers of a trial, and in brackets the median step. {_shown(known, found)}."
    times = (fastest.tokens_per_s or 0) / (slowest.tokens_per_s or 1)
    if times >= 1 + ONE_RUN_SPEED:
        words += f" {fastest.label} is {times:.2g} times as fast as {slowest.label}."
    svg = bar_plot("Speed", words, bars, Axis("tokens a second", quantities.rate))
    return Figure("Speed", svg, (), words)


def pareto_charts(
    sweep: SweepResult, found: Sequence[ConfigurationSummary], front: ParetoFront, recommended: str | None
) -> tuple[Figure, ...]:
    """The first metric of the front against each other one; the front of all of them stands out."""
    metric, *others = front.metrics
    # Against itself an objective makes no picture.
    if metric == "step_time_s":
        others = [other for other in others if other != "tokens_per_s"]
    costs = (_cost(sweep, found, metric, other) for other in others)
    figures = (_pareto_chart(metric, cost, found, front, recommended) for cost in costs)
    return tuple(figure for figure in figures if figure)


def _cost(sweep: SweepResult, found: Sequence[ConfigurationSummary], metric: str, other: str) -> Cost:
    unit, name = memory_unit(max((s.peak_memory_bytes or 0 for s in found), default=0))
    known = {
        "peak_memory_bytes": Cost(
            f"{metric} against memory",
            Axis(f"peak memory of a worker ({name})"),
            lambda s: s.peak_memory_bytes / unit if s.peak_memory_bytes else None,
        ),
        "tokens_per_s": Cost(
            f"{metric} against speed", Axis("tokens a second", quantities.rate), lambda s: s.tokens_per_s
        ),
    }
    trials = by_id(sweep)
    return known.get(other) or Cost(
        f"{metric} against {other}", Axis(other), lambda s: value_of(sweep, s, other, trials)
    )


def _pareto_chart(
    metric: str, cost: Cost, found: Sequence[ConfigurationSummary], front: ParetoFront, recommended: str | None
) -> Figure | None:
    known = [s for s in found if s.objective and cost.of(s) is not None]
    if len(known) < 2 or are_the_same([s.objective.mean for s in known if s.objective]):
        return None
    on_front = [s.configuration_id for s in known if s.configuration_id in front.configuration_ids]
    styles: dict[str | None, str] = {**dict.fromkeys(on_front, "s0"), recommended: "s1"}
    labelled = {*on_front[:MAX_LABELS], recommended}
    # What stands out is drawn last, on top of the others.
    ordered = sorted(known, key=lambda s: (s.configuration_id == recommended, s.configuration_id in on_front))
    dots = [_pareto_dot(s, cost, styles, s.configuration_id in labelled) for s in ordered]
    words = (
        f"{len(on_front)} of {len(known)} configurations are on the Pareto front of {front.words}: no other one that "
        "competes is as good in all of them."
    )
    svg = xy_plot(cost.title, words, cost.axis, Axis(metric), dots=dots)
    keys = (Key("s1", "recommended"), Key("s0", "on the Pareto front"), Key("rest", "beaten, or does not compete"))
    drawn = {dot.style for dot in dots}
    return Figure(cost.title, svg, tuple(Key(f"{k.style} dot", k.label) for k in keys if k.style in drawn), words)


def _pareto_dot(summary: ConfigurationSummary, cost: Cost, styles: Mapping[str | None, str], is_labelled: bool) -> Dot:
    assert summary.objective
    figures = (
        quantities.plus_minus(summary.objective.mean, summary.objective.half_width),
        quantities.memory(summary.peak_memory_bytes),
        f"{quantities.rate(summary.tokens_per_s)} tokens/s",
    )
    return Dot(
        (cost.of(summary) or 0.0, summary.objective.mean),
        f"{summary.label}: {', '.join(figures)}",
        styles.get(summary.configuration_id, "rest"),
        summary.label if is_labelled else "",
    )


def memory_unit(largest_bytes: int) -> tuple[int, str]:
    """What to divide bytes by, and its name."""
    return (2**30, "GiB") if largest_bytes >= 2**30 else (2**20, "MiB")
