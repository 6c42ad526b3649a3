"""The report's figures: curves, memory, speed, what a better objective costs, and each setting's effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.reporting import quantities
from orchestrator.reporting.curves import MeanCurve
from orchestrator.reporting.effects import Effect, grouping, sort_key
from orchestrator.reporting.plot import Axis, Bar, Dot, Line, bar_plot, xy_plot
from orchestrator.reporting.statistics import ConfigurationSummary, Estimate, spell
from orchestrator.results.records import SweepResult

MAX_COLOURS = 8
MAX_LINES = 30
MAX_GREY = 60
MAX_BARS = 24
MAX_CURVE_CHARTS = 4
MAX_LABELS = 8


@dataclass(frozen=True, slots=True)
class Key:
    """One line of a figure's legend."""

    style: str
    label: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with what a reader needs to read it."""

    title: str
    svg: str
    keys: tuple[Key, ...]
    caption: str


def loss_curves(sweep: SweepResult, drawn: Sequence[MeanCurve]) -> tuple[Figure, ...]:
    """The evaluation's loss over the steps: a figure for every searched setting, coloured by its values."""
    if not drawn:
        return ()
    names = [name for name in sweep.searched if len({spell_of(d.summary, name) for d in drawn}) > 1]
    return tuple(_curves_by(name, drawn) for name in names[:MAX_CURVE_CHARTS] or [""])


def spell_of(summary: ConfigurationSummary, name: str) -> str:
    """The value that a configuration has of a searched setting."""
    return spell(dict(summary.settings).get(name))


def _curves_by(name: str, drawn: Sequence[MeanCurve]) -> Figure:
    settings = [dict(d.summary.settings).get(name) for d in drawn]
    colour_of, keys = colours(settings)
    bright, others = drawn[:MAX_LINES], drawn[MAX_LINES:]
    grey = others[:: math.ceil(len(others) / MAX_GREY) or 1]
    has_bands = len(bright) <= MAX_COLOURS
    lines = [Line(d.points, d.summary.label) for d in grey]
    # The best is drawn last, on top of the others.
    for curve in reversed(bright):
        style = colour_of(dict(curve.summary.settings).get(name)) + (" best" if curve is drawn[0] else "")
        lines.append(Line(curve.points, curve.summary.label, style, curve.band if has_bands else ()))
    title = f"Evaluation loss by {name}" if name else "Evaluation loss"
    told = f"{len(bright)} configurations" if len(bright) > 1 else drawn[0].summary.label
    repeats = max(curve.repeats for curve in drawn)
    words = [f"Mean of the evaluation's loss over optimizer steps; {told}, the best one thicker."]
    if repeats > 1:
        band = " with its 95 % interval, the seeds' common shift taken out" if has_bands else ""
        words.append(f"Each line is the mean of up to {repeats} repeats{band}.")
    if len(drawn) > MAX_LINES:
        words.append(f"The best {MAX_LINES} of {len(drawn)} are in colour, {len(grey)} others in grey.")
    svg = xy_plot(title, " ".join(words), Axis("optimizer step"), Axis("eval_loss (nats a token)"), lines)
    return Figure(
        title, svg, tuple(Key(key.style, f"{name} {key.label}") for key in keys) if name else (), " ".join(words)
    )


def colours(values: Sequence[Any]) -> tuple[Callable[[Any], str], tuple[Key, ...]]:
    """A class of the palette for each value, numbers in their order; more than eight groups share quarters."""
    group_of = grouping(values)
    first: dict[str, Any] = {}
    for value in sorted(values, key=sort_key):
        first.setdefault(group_of(value), value)
    styles = {group: f"s{place}" if place < MAX_COLOURS else "rest" for place, group in enumerate(first)}
    return lambda value: styles[group_of(value)], tuple(Key(style, group) for group, style in styles.items())


def memory_chart(found: Sequence[ConfigurationSummary], kind: str) -> Figure | None:
    """Peak memory of one worker by configuration, measured as bars, predicted as marks."""
    known = [s for s in found if s.peak_memory_bytes or s.predicted_memory_bytes][:MAX_BARS]
    if not known:
        return None
    largest = max(max(s.peak_memory_bytes or 0, s.predicted_memory_bytes or 0) for s in known)
    unit, name = _memory_unit(largest)
    bars = [
        Bar(
            s.label,
            (s.peak_memory_bytes or 0) / unit,
            quantities.memory(s.peak_memory_bytes) if s.peak_memory_bytes else "not run",
            "s0",
            s.predicted_memory_bytes / unit if s.predicted_memory_bytes else None,
        )
        for s in known
    ]
    what = "torch's max_memory_allocated" if kind == "cuda_allocated" else "the process's peak resident memory"
    words = f"Peak memory of one worker, the largest of the repeats ({what}); {_shown(known, found)}."
    ratios = [
        s.predicted_memory_bytes / s.peak_memory_bytes
        for s in known
        if s.predicted_memory_bytes and s.peak_memory_bytes
    ]
    if ratios:
        words += f" Predicted is {min(ratios):.2f} to {max(ratios):.2f} times what was measured."
    svg = bar_plot("Peak memory", words, bars, Axis(f"peak memory of a worker ({name})"))
    return Figure("Peak memory", svg, (Key("s0", "measured"), Key("mark", "predicted before launch")), words)


def _shown(known: Sequence[ConfigurationSummary], found: Sequence[ConfigurationSummary]) -> str:
    return (
        f"the best {len(known)} of {len(found)} configurations" if len(known) < len(found) else "best objective first"
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
    words = f"Tokens a second over all workers of a trial, and the median step time; {_shown(known, found)}."
    if fastest is not slowest:
        times = (fastest.tokens_per_s or 0) / (slowest.tokens_per_s or 1)
        words += f" {fastest.label} is {times:.2g} times as fast as {slowest.label}."
    svg = bar_plot("Speed", words, bars, Axis("tokens a second", quantities.rate))
    return Figure("Speed", svg, (), words)


def pareto_chart(
    sweep: SweepResult, found: Sequence[ConfigurationSummary], front: frozenset[str], recommended: str | None
) -> Figure | None:
    """Objective against peak memory; the Pareto front stands out."""
    known = [s for s in found if s.objective and s.peak_memory_bytes]
    if len(known) < 2:
        return None
    unit, name = _memory_unit(max(s.peak_memory_bytes or 0 for s in known))
    on_front = [s.configuration_id for s in known if s.configuration_id in front]
    styles: dict[str | None, str] = {**dict.fromkeys(on_front, "s0"), recommended: "s1"}
    labelled = {*on_front[:MAX_LABELS], recommended}
    # What stands out is drawn last, on top of the others.
    ordered = sorted(known, key=lambda s: (s.configuration_id == recommended, s.configuration_id in front))
    dots = [_pareto_dot(s, unit, styles, s.configuration_id in labelled) for s in ordered]
    metric = sweep.objective_metric
    words = (
        f"{len(on_front)} of {len(known)} configurations are on the Pareto front of {metric}, peak memory and tokens a "
        "second: no other one is as good in all three."
    )
    title = f"{metric} against memory"
    svg = xy_plot(title, words, Axis(f"peak memory of a worker ({name})"), Axis(metric), dots=dots)
    keys = (Key("s1", "recommended"), Key("s0", "on the Pareto front"), Key("rest", "beaten by another one"))
    drawn = {dot.style for dot in dots}
    return Figure(title, svg, tuple(Key(f"{k.style} dot", k.label) for k in keys if k.style in drawn), words)


def _pareto_dot(summary: ConfigurationSummary, unit: int, styles: Mapping[str | None, str], is_labelled: bool) -> Dot:
    assert summary.objective
    figures = (
        quantities.plus_minus(summary.objective.mean, summary.objective.half_width),
        quantities.memory(summary.peak_memory_bytes),
        f"{quantities.rate(summary.tokens_per_s)} tokens/s",
    )
    return Dot(
        ((summary.peak_memory_bytes or 0) / unit, summary.objective.mean),
        f"{summary.label}: {', '.join(figures)}",
        styles.get(summary.configuration_id, "rest"),
        summary.label if is_labelled else "",
    )


def _memory_unit(largest_bytes: int) -> tuple[int, str]:
    return (2**30, "GiB") if largest_bytes >= 2**30 else (2**20, "MiB")


def effect_charts(sweep: SweepResult, effects: Sequence[Effect]) -> tuple[Figure, ...]:
    """What each value of each searched setting does to the objective, with its 95 % interval."""
    return tuple(_effect_chart(sweep, effect) for effect in effects)


def _effect_chart(sweep: SweepResult, effect: Effect) -> Figure:
    metric, first = sweep.objective_metric, effect.values[0]
    matched = [value.difference for value in effect.values[1:]]
    if all(difference and difference.half_width is not None for difference in matched):
        estimates = [Estimate(0.0, None, first.objective.count), *(difference for difference in matched if difference)]
        label = f"change of {metric}"
        words = f"Change of {metric} from {effect.setting}={first.value}, all else alike, seed by seed; 95 % intervals."
    else:
        estimates, label = [value.objective for value in effect.values], metric
        words = f"Mean {metric} of the completed trials with each value, with its 95 % interval where it has one."
    if effect.explained is not None:
        words += f" {effect.setting} alone accounts for {quantities.share(effect.explained)} of the variance."
    dots = [
        Dot(
            (place, known.mean),
            f"{effect.setting}={value.value}: {quantities.plus_minus(known.mean, known.half_width)}",
            "s0",
            half_height=known.half_width,
        )
        for place, (value, known) in enumerate(zip(effect.values, estimates, strict=True))
    ]
    places = tuple(float(place) for place in range(len(dots)))
    axis = Axis(effect.setting, lambda place: effect.values[int(place)].value, places)
    title = f"Effect of {effect.setting}"
    return Figure(title, xy_plot(title, words, axis, Axis(label), dots=dots), (), words)
