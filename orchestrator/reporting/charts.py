"""What a figure of the report is, its colours, and the loss curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import counted
from orchestrator.reporting.curves import Curve, MeanCurve, mean_curves, value_curves
from orchestrator.reporting.effects import grouping, sort_key
from orchestrator.reporting.plot import Axis, Line, is_cut, xy_plot
from orchestrator.reporting.statistics import ConfigurationSummary, spell
from orchestrator.results.records import SweepResult

MAX_COLOURS = 8
MAX_LINES = 30
MAX_GREY = 60
MAX_CURVE_CHARTS = 4


@dataclass(frozen=True, slots=True)
class Key:
    """One line of a figure's legend."""

    style: str
    """A class of the palette, with `dot`, `bar` or `mark` for what is no line."""
    label: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with what a reader needs to read it."""

    title: str
    svg: str
    keys: tuple[Key, ...]
    caption: str


def loss_curves(
    sweep: SweepResult, found: Sequence[ConfigurationSummary], curves: Mapping[str, Curve]
) -> tuple[Figure, ...]:
    """The evaluation's loss over the steps: a figure for every searched setting, coloured by its values."""
    drawn = mean_curves(sweep, found, curves)
    if all(len(curve.points) < 2 for curve in drawn):
        # Evaluated once, at the end: the table says it.
        return ()
    names = [name for name in sweep.searched if len({spell(dict(d.settings).get(name)) for d in drawn}) > 1]
    if len(drawn) <= MAX_COLOURS:
        return tuple(_curves_by(name, drawn) for name in names[:MAX_CURVE_CHARTS] or [""])
    by_value = {name: value_curves(sweep, name, curves) for name in names[:MAX_CURVE_CHARTS]}
    return tuple(
        _means_by(name, means, combinations, drawn) if means else _curves_by(name, drawn)
        for name, (means, combinations) in by_value.items()
    )


def _means_by(name: str, means: Sequence[MeanCurve], combinations: int, drawn: Sequence[MeanCurve]) -> Figure:
    """In colour each value's mean, in grey all configurations."""
    styles = [f"s{place}" if place < MAX_COLOURS else "rest" for place in range(len(means))]
    grey = drawn[:: math.ceil(len(drawn) / MAX_GREY)]
    lines = [Line(curve.points, curve.label) for curve in grey]
    lines += [Line(m.points, m.label, f"{style} mean", m.band) for m, style in zip(means, styles, strict=True)]
    alike = f"{counted(combinations, 'combination')} of the other settings that completed with every one of them"
    words = f"Loss of the evaluation over optimizer steps. In colour: the mean with each {name}, over {alike}"
    words += f"{_band_words(lines)}. In grey: {len(grey)} of {len(drawn)} configurations."
    title = f"Evaluation loss by {name}"
    svg = xy_plot(title, words, Axis("optimizer step"), Axis("eval_loss (nats a token)"), lines)
    keys = tuple(Key(style, m.label.replace("=", " ", 1)) for m, style in zip(means, styles, strict=True))
    return Figure(title, svg, keys, words)


def _curves_by(name: str, drawn: Sequence[MeanCurve]) -> Figure:
    settings = [dict(d.settings).get(name) for d in drawn]
    colour_of, keys = colours(settings)
    bright, others = drawn[:MAX_LINES], drawn[MAX_LINES:]
    grey = others[:: math.ceil(len(others) / MAX_GREY) or 1]
    has_bands = len(bright) <= MAX_COLOURS
    lines = [Line(d.points, d.label) for d in grey]
    # The best is drawn last, on top of the others.
    for curve in reversed(bright):
        style = colour_of(dict(curve.settings).get(name)) + (" best" if curve is drawn[0] else "")
        lines.append(Line(curve.points, curve.label, style, curve.band if has_bands else ()))
    title = f"Evaluation loss by {name}" if name else "Evaluation loss"
    told = f"{len(bright)} configurations" if len(bright) > 1 else drawn[0].label
    if any(len(curve.points) == 1 for curve in drawn):
        told += "; a dot was evaluated once"
    repeats = max(curve.repeats for curve in drawn)
    words = [f"Loss of the evaluation over optimizer steps: {told}. The line of the best is thicker."]
    if repeats > 1:
        words.append(f"Each line is the mean of up to {repeats} repeats{_band_words(lines)}.")
    if len(drawn) > MAX_LINES:
        words.append(f"The best {MAX_LINES} of {len(drawn)} are in colour, {len(grey)} others in grey.")
    svg = xy_plot(title, " ".join(words), Axis("optimizer step"), Axis("eval_loss (nats a token)"), lines)
    return Figure(
        title, svg, tuple(Key(key.style, f"{name} {key.label}") for key in keys) if name else (), " ".join(words)
    )


def _band_words(lines: Sequence[Line]) -> str:
    """Which interval the bands are, since the table has another of the same means."""
    if not any(len(line.band) > 1 for line in lines):
        return ""
    beyond = "; a band that reaches the edge of the drawing goes on beyond it" if is_cut(lines) else ""
    return (
        " with its 95 % interval by Student's t, without the shift that a seed gives all of them alike, so that lines "
        f"can be compared (the table's ± has that shift in it){beyond}"
    )


def colours(values: Sequence[Any]) -> tuple[Callable[[Any], str], tuple[Key, ...]]:
    """A class of the palette for each value, numbers in their order; more than eight groups share quarters."""
    group_of = grouping(values)
    first: dict[str, Any] = {}
    for value in sorted(values, key=sort_key):
        first.setdefault(group_of(value), value)
    styles = {group: f"s{place}" if place < MAX_COLOURS else "rest" for place, group in enumerate(first)}
    return lambda value: styles[group_of(value)], tuple(Key(style, group) for group, style in styles.items())
