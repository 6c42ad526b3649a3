"""The report's figures of single settings: what each does to the objective, to memory and to speed, and which count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orchestrator.reporting import quantities
from orchestrator.reporting.charts import MAX_COLOURS, Figure, Key
from orchestrator.reporting.cost_charts import memory_unit
from orchestrator.reporting.effects import MAX_VALUES, Effect, SettingValue, sort_key
from orchestrator.reporting.plot import Axis, Bar, Dot, Line, bar_plot, xy_plot
from orchestrator.reporting.statistics import ConfigurationSummary, Estimate, are_the_same, spell

NAMES = frozenset({"zero_stage", "seed"})
"""Numbers that name a choice and measure nothing."""
MAX_SETTINGS = 2


def effect_table(metric: str, effects: Sequence[Effect]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Headings and rows of what there is to tell: a search that draws its values has no pairs to compare."""
    headings = (
        "setting",
        "value",
        "completed",
        f"mean {metric}",
        "change from the first that has pairs",
        "seeds",
        "change from the value before",
        "memory",
        "speed",
    )
    rows = [_table_row(effect, value) for effect in effects for value in effect.values]
    told = [place for place in range(len(headings)) if any(row[place] for row in rows)]
    return tuple(headings[place] for place in told), tuple(tuple(row[place] for place in told) for row in rows)


def _table_row(effect: Effect, value: SettingValue) -> tuple[str, ...]:
    measured = (value.objective, value.difference, value.gain)
    mean, difference, gain = (quantities.plus_minus(e.mean, e.half_width) if e else "" for e in measured)
    ratios = (quantities.ratio(e.mean, e.half_width) if e else "" for e in (value.memory_ratio, value.speed_ratio))
    completed = str(value.objective.count if value.objective else 0)
    seeds = str(value.difference.count) if value.difference else ""
    return (effect.setting, value.value, completed, mean, difference, seeds, gain, *ratios)


def effect_charts(metric: str, effects: Sequence[Effect]) -> tuple[Figure, ...]:
    """What each value of each searched setting does to the objective, with its 95 % interval where seeds tell one."""
    figures = (_effect_chart(metric, effect) for effect in effects)
    return tuple(figure for figure in figures if figure)


def _effect_chart(metric: str, effect: Effect) -> Figure | None:
    known = [value for value in effect.values if value.objective]
    if len(known) < 2 or are_the_same([value.objective.mean for value in known if value.objective]):
        return None
    matched = [value.difference for value in known[1:]]
    estimates: list[Estimate] = [value.objective for value in known if value.objective]
    label = metric
    words = f"Mean {metric} of the completed trials with each value, whatever their other settings."
    if known[0] is effect.values[0] and all(d and d.half_width is not None for d in matched):
        estimates = [Estimate(0.0, None, estimates[0].count), *(d for d in matched if d)]
        label = f"change of {metric}"
        words = (
            f"Change of {metric} from {effect.setting}={known[0].value}, all else alike, seed by seed; 95 % intervals."
        )
        if all(max(abs(e.mean), e.half_width or 0.0) < quantities.NOTHING for e in estimates):
            # Differences in the last bits alone make no picture.
            return None
    dots = [
        Dot(
            (place, one.mean),
            f"{effect.setting}={value.value}: {quantities.plus_minus(one.mean, one.half_width)}",
            "s0",
            half_height=one.half_width,
        )
        for place, (value, one) in enumerate(zip(known, estimates, strict=True))
    ]
    title = f"Effect of {effect.setting}"
    axis = _row(effect.setting, [value.value for value in known])
    return Figure(title, xy_plot(title, words, axis, Axis(label), dots=dots), (), words)


def _row(label: str, values: Sequence[str]) -> Axis:
    """Values side by side, however far apart they are as numbers."""
    return Axis(label, lambda place: values[int(place)], tuple(float(place) for place in range(len(values))))


def importance_chart(metric: str, found: Mapping[str, float]) -> Figure | None:
    """The share of the objective's variance by setting."""
    if not found:
        return None
    words = (
        f"Share of what the settings explain of {metric}'s variance, over the whole space and whatever the other "
        "settings are (fANOVA on a random forest over the completed trials)."
    )
    if any(" and " in name for name in found):
        words += " Settings that always changed together have one share: nothing here tells them apart."
    bars = [Bar(name, 100 * share, quantities.share(share), "s0") for name, share in found.items()]
    title = "Which settings count"
    return Figure(title, bar_plot(title, words, bars, Axis("share of the variance (%)")), (), words)


def response_charts(searched: Sequence[str], found: Sequence[ConfigurationSummary]) -> tuple[Figure, ...]:
    """Memory and speed over each setting that measures something, a line for every combination of the others."""
    unit, name = memory_unit(max((s.peak_memory_bytes or 0 for s in found), default=0))
    costs: tuple[tuple[str, Axis, Callable[[ConfigurationSummary], float | None]], ...] = (
        (
            "Peak memory",
            Axis(f"peak memory of a worker ({name})", from_zero=True),
            lambda s: s.peak_memory_bytes / unit if s.peak_memory_bytes else None,
        ),
        ("Speed", Axis("tokens a second", quantities.rate, from_zero=True), lambda s: s.tokens_per_s),
    )
    measures = [setting for setting in searched if _measures(setting, found)][:MAX_SETTINGS]
    figures = (_response(setting, *cost, found) for setting in measures for cost in costs)
    return tuple(figure for figure in figures if figure)


def _measures(setting: str, found: Sequence[ConfigurationSummary]) -> bool:
    values = [dict(summary.settings)[setting] for summary in found]
    numbers = {value for value in values if isinstance(value, int | float) and not isinstance(value, bool)}
    return setting not in NAMES and len(numbers) > 1 and len(set(map(spell, values))) <= MAX_VALUES


def _response(
    setting: str,
    what: str,
    axis: Axis,
    cost_of: Callable[[ConfigurationSummary], float | None],
    found: Sequence[ConfigurationSummary],
) -> Figure | None:
    known = [summary for summary in found if cost_of(summary)]
    values = [spell(v) for v in sorted({dict(s.settings)[setting] for s in known}, key=sort_key)]
    lines: dict[tuple[tuple[str, Any], ...], list[tuple[float, float]]] = {}
    for summary in known:
        others = tuple((n, v) for n, v in summary.settings if n != setting)
        at = float(values.index(spell(dict(summary.settings)[setting])))
        lines.setdefault(others, []).append((at, cost_of(summary) or 0.0))
    if len(values) < 2:
        return None
    best = sorted(list(lines)[:MAX_COLOURS], key=lambda others: [sort_key(value) for _, value in others])
    drawn = [
        Line(tuple(sorted(lines[others])), " ".join(f"{n}={spell(v)}" for n, v in others) or what, f"s{place}")
        for place, others in enumerate(best)
    ]
    title = f"{what} by {setting}"
    words = "As measured, stopped trials too."
    if len(drawn) < len(lines):
        words += f" The best {len(drawn)} of {len(lines)} combinations of the other settings, a line each."
    elif len(lines) > 1:
        words += " A line for every combination of the other settings."
    svg = xy_plot(title, words, _row(setting, values), axis, drawn)
    keys = tuple(Key(line.style, line.title) for line in drawn) if len(lines) > 1 else ()
    return Figure(title, svg, keys, words)
