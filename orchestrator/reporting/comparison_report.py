"""Sweeps side by side as text, as JSON, and as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from orchestrator.reporting import quantities
from orchestrator.reporting.charts import MAX_COLOURS, Figure, Key
from orchestrator.reporting.comparison import ComparedSweep, Comparison
from orchestrator.reporting.cost_charts import memory_chart, memory_unit, parts_of, speed_chart
from orchestrator.reporting.findings import objective_text
from orchestrator.reporting.pages import plain, render_page
from orchestrator.reporting.plot import Axis, Dot, xy_plot
from orchestrator.reporting.statistics import ConfigurationSummary

HEADS = ("sweep", "recommended", "objective", "memory", "tokens/s", "took", "completed")


def render_text(comparison: Comparison) -> str:
    """The comparison for a terminal."""
    rows = [HEADS, *(_row(sweep) for sweep in comparison.sweeps)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines = [comparison.answer, *(f"  - {told}" for told in comparison.besides), "", *table]
    if comparison.shared:
        lines += ["", "ran in several, all settings alike:"]
    for shared in comparison.shared:
        told = [f"{name} {objective_text(summary)}" for name, summary in shared.by_sweep.items()]
        apart = [f"{n} {quantities.plus_minus(e.mean, e.half_width)}" for n, e in shared.differences.items()]
        lines.append(f"  {shared.label}: {', '.join(told)}" + (f"; difference: {', '.join(apart)}" if apart else ""))
    return "\n".join(lines)


def _row(sweep: ComparedSweep) -> tuple[str, ...]:
    chosen = sweep.recommended
    return (
        sweep.name,
        sweep.chosen_label or quantities.UNKNOWN,
        objective_text(chosen) if chosen else quantities.UNKNOWN,
        quantities.memory(chosen.peak_memory_bytes if chosen else None),
        quantities.rate(chosen.tokens_per_s if chosen else None),
        quantities.duration(sweep.report.times.wall_s),
        f"{sweep.completed} of {len(sweep.report.sweep.trials)}",
    )


def render_json(comparison: Comparison) -> str:
    """Every figure of the comparison, for scripts; those of one sweep are in its own report."""
    whole = {
        "schema_version": 1,
        "answer": comparison.answer,
        "differing": comparison.differing,
        "is_comparable": comparison.is_comparable,
        "sweeps": [
            {
                "name": sweep.name,
                "folder": str(sweep.report.folder),
                "question": sweep.report.sweep.question,
                "recommendation": asdict(sweep.report.recommendation),
                "recommended": asdict(sweep.recommended) if sweep.recommended else None,
                "counts": sweep.report.counts,
                "times": asdict(sweep.report.times),
            }
            for sweep in comparison.sweeps
        ],
        "shared": [asdict(shared) for shared in comparison.shared],
    }
    return json.dumps(plain(whole), indent=1, ensure_ascii=False, allow_nan=False)


def render_html(comparison: Comparison) -> str:
    """One file that needs no network and no script to be read."""
    return render_page("comparison.html.jinja", _page(comparison))


def _page(comparison: Comparison) -> dict[str, Any]:
    chosen: list[ConfigurationSummary] = []
    parts: dict[str, dict[str, int]] = {}
    for sweep in comparison.sweeps:
        if found := sweep.recommended:
            # The settings alone name a configuration: another sweep's, of another model, would have the same.
            identity = f"{sweep.name}: {found.configuration_id}"
            if held := parts_of(sweep.report.plan, [found]).get(found.configuration_id):
                parts[identity] = held
            chosen.append(replace(found, label=f"{sweep.name}: {found.label}", configuration_id=identity))
    kinds = [t.peak_memory.kind for s in comparison.sweeps for t in s.report.sweep.trials if t.peak_memory]
    bars = [memory_chart(chosen, parts, kinds[0] if kinds else "resident"), speed_chart(chosen)]
    scatter = _scatter(comparison.sweeps) if comparison.is_comparable else []
    return {
        "comparison": comparison,
        "figures": [figure for figure in [*scatter, *bars] if figure],
        "objective_text": objective_text,
        "plus_minus": lambda e: quantities.plus_minus(e.mean, e.half_width) if e else "",
        "metric": comparison.sweeps[0].report.sweep.objective_metric,
    }


def _scatter(sweeps: Sequence[ComparedSweep]) -> list[Figure]:
    """Every configuration of every sweep, its objective against memory and against speed, a colour for each sweep."""
    metric = sweeps[0].report.sweep.objective_metric
    unit, name = memory_unit(
        max((s.peak_memory_bytes or 0 for sweep in sweeps for s in sweep.report.summaries), default=0)
    )
    costs: tuple[tuple[str, Axis, Callable[[ConfigurationSummary], float | None]], ...] = (
        ("memory", Axis(f"peak memory of a worker ({name})"), lambda s: (s.peak_memory_bytes or 0) / unit),
        ("speed", Axis("tokens a second", quantities.rate), lambda s: s.tokens_per_s),
    )
    words = "Every configuration that completed; labelled are those that the sweeps recommend."
    figures = []
    for what, axis, cost_of in costs:
        dots = [
            _dot(sweep, summary, cost, place)
            for place, sweep in enumerate(sweeps)
            for summary in sweep.report.summaries
            if summary.objective and (cost := cost_of(summary))
        ]
        title = f"{metric} against {what}"
        if svg := xy_plot(title, words, axis, Axis(metric), dots=sorted(dots, key=lambda dot: bool(dot.label))):
            keys = tuple(Key(f"{_style(place)} dot", sweep.name) for place, sweep in enumerate(sweeps))
            figures.append(Figure(title, svg, keys, words))
    return figures


def _dot(sweep: ComparedSweep, summary: ConfigurationSummary, cost: float, place: int) -> Dot:
    assert summary.objective
    is_chosen = summary.configuration_id == sweep.report.recommendation.configuration_id
    at = (cost, summary.objective.mean)
    return Dot(at, f"{sweep.name}: {summary.label}", _style(place), summary.label if is_chosen else "")


def _style(place: int) -> str:
    return f"s{place}" if place < MAX_COLOURS else "rest"
